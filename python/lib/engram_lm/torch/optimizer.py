"""What trains the weights: Muon for the matrices of the blocks, Adam for everything else; memory rows are not here.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by five
Newton–Schulz steps, scaled by 0.2·√(max(rows, columns)) (arXiv 2502.16982). A stack of experts is a batch of matrices.
State has the names and the shapes that the Rust trainer's checkpoints have.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engram_lm.config import OptimizerConfig

Named = tuple[str, nn.Parameter]


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: a projection of attention, feed-forward, experts or memory."""
    others = ("router", "norm", "convolution", "_streams")
    return name.startswith("blocks.") and parameter.dim() in (2, 3) and not any(other in name for other in others)


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of matrices [count, rows, columns], roughly."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices [rows, columns] and stacks of them."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].mul_(momentum).add_(p.grad)
                nesterov = p.grad.add(average, alpha=momentum)
                update = newton_schulz(nesterov.view(-1, *p.shape[-2:])).view_as(p)
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(update, alpha=-rate * 0.2 * math.sqrt(max(p.shape[-2:])))


class Optimizer:
    """Muon and Adam over a model's weights, with one schedule and one norm to clip by."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        named = list(model.named_parameters())
        self.matrices = [(name, p) for name, p in named if is_matrix(name, p)]
        self.others = [(name, p) for name, p in named if not is_matrix(name, p)]
        self.muon = Muon(_parameters(self.matrices), config.muon_rate, config.momentum, config.weight_decay)
        beta1, beta2 = config.betas
        self.adam = torch.optim.Adam(
            _parameters(self.others), config.adam_rate, (beta1, beta2), config.epsilon, fused=True
        )

    def step(self, schedule: float) -> float:
        """Clips, and takes a step at `schedule` times the peak rates. Gives the gradient's norm before clipping.

        Raises `FloatingPointError` if it is not finite; the weights are then as they were.
        """
        every = [p.grad for _, p in (*self.matrices, *self.others) if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(every))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}: lower the rates, or begin from a checkpoint")
        if norm > self.config.clip:
            torch._foreach_mul_(every, self.config.clip / norm)
        for optimizer, rate in ((self.muon, self.config.muon_rate), (self.adam, self.config.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = schedule * rate
            optimizer.step()
        return norm

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        self.muon.zero_grad()
        self.adam.zero_grad()

    def export_state(self) -> dict[str, Tensor]:
        """The state by name and moment, flat: `….momentum` of Muon, `….first` and `….second` of Adam."""
        state = {}
        for name, p in self.matrices:
            if self.muon.state[p]:
                state[f"{name}.momentum"] = self.muon.state[p]["momentum"].flatten().clone()
        for name, p in self.others:
            if self.adam.state[p]:
                state[f"{name}.first"] = self.adam.state[p]["exp_avg"].flatten().clone()
                state[f"{name}.second"] = self.adam.state[p]["exp_avg_sq"].flatten().clone()
        return state

    def import_state(self, state: dict[str, Tensor], step: int) -> None:
        """Takes the state that `export_state`, or the Rust trainer, has left after `step` steps.

        Raises `ValueError` for a moment that is missing or unknown.
        """
        if step == 0 and not state:
            return
        state = dict(state)

        def take(name: str, p: nn.Parameter) -> Tensor:
            if name not in state:
                raise ValueError(f"the optimiser's state has no `{name}`")
            return state.pop(name).view_as(p).to(p.device, copy=True)

        for name, p in self.matrices:
            self.muon.state[p] = {"momentum": take(f"{name}.momentum", p)}
        for name, p in self.others:
            self.adam.state[p] = {
                "step": torch.tensor(float(step), device=p.device),
                "exp_avg": take(f"{name}.first", p),
                "exp_avg_sq": take(f"{name}.second", p),
            }
        if state:
            raise ValueError(f"the optimiser's state has `{min(state)}`, which belongs to no weight")


def _parameters(named: list[Named]) -> list[nn.Parameter]:
    return [p for _, p in named]
