"""What trains the weights: Muon for the matrices of the blocks, Adam for everything else, as each module declares it.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix, found by five
Newton–Schulz steps, scaled by 0.2·√(max(rows, columns)) (arXiv 2502.16982). Every matrix is orthogonalised by itself,
also where a weight holds several (`engram_lm.torch.training`); those of one shape go in one batch.
Memory rows are not here: no decay or clipping touches them. State has the names that the Rust trainer's checkpoints
have.
"""

import math

import torch
from torch import Tensor, nn

from engram_lm.config import OptimizerConfig
from engram_lm.torch.training import ByAdam, Matrices, training_plan

MUON_SCALE = 0.2


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of matrices [count, rows, columns], roughly."""
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def muon_update(matrices: list[Tensor]) -> list[Tensor]:
    """Every batch of matrices [count, rows, columns] made orthogonal and scaled; those of one shape together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for index, batch in enumerate(matrices):
        by_shape.setdefault(batch.shape[1:], []).append(index)
    updates: dict[int, Tensor] = {}
    for shape, indices in by_shape.items():
        together = newton_schulz(torch.cat([matrices[index] for index in indices]))
        together = together * (MUON_SCALE * math.sqrt(max(shape)))
        updates.update(zip(indices, together.split([len(matrices[index]) for index in indices]), strict=True))
    return [updates[index] for index in range(len(matrices))]


class Muon(torch.optim.Optimizer):
    """Muon for weights whose matrices are declared."""

    def __init__(
        self,
        weights: list[tuple[nn.Parameter, Matrices]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        heads_apart: bool = False,
    ) -> None:
        super().__init__([p for p, _ in weights], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.matrices = dict(weights)
        self.heads_apart = heads_apart

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            split = [self.matrices[p].split(self._nesterov(p, group["momentum"]), self.heads_apart) for p in learning]
            updates = iter(muon_update([batch for batches in split for batch in batches]))
            for p, batches in zip(learning, split, strict=True):
                update = self.matrices[p].join([next(updates) for _ in batches], p, self.heads_apart)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum after a gradient: with m ← μ·m + g, it is g + μ·m."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average: Tensor = state["momentum"].mul_(momentum).add_(p.grad)
        return p.grad.add(average, alpha=momentum)


class Optimizer:
    """Muon and Adam over a model's weights, with one schedule and one norm to clip by."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        """Raises `ValueError` if no module of `model` declares how one of its weights is trained."""
        self.config = config
        plan, named = training_plan(model), dict(model.named_parameters())
        muon = {name: training for name, training in plan.items() if isinstance(training, Matrices)}
        self.matrices = {name: named[name] for name in muon}
        self.others = {name: named[name] for name in plan if name not in muon}
        self.muon = Muon(
            [(named[name], matrices) for name, matrices in muon.items()],
            config.muon_rate,
            config.momentum,
            config.weight_decay,
            config.muon_heads_apart,
        )
        groups = []
        for decays, decay in ((True, config.adam_weight_decay), (False, 0.0)):
            weights = [p for name, p in self.others.items() if plan[name] == ByAdam(decays)]
            groups.append({"params": weights, "weight_decay": decay})
        beta1, beta2 = config.betas
        self.adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], config.adam_rate, (beta1, beta2), config.epsilon, fused=True
        )

    def norm(self) -> float:
        """Euclidean norm of all gradients as one vector."""
        return float(torch.nn.utils.get_total_norm(self._gradients()))

    def step(self, schedule: float, norm: float | None = None) -> float:
        """Clips, and takes a step at `schedule` times the peak rates. Gives the gradient's norm before clipping.

        `norm`: that norm, if it is known already. Raises `FloatingPointError` if it is not finite; the weights are
        then as they were.
        """
        norm = self.norm() if norm is None else norm
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}: lower the rates, or begin from a checkpoint")
        if norm > self.config.clip:
            torch._foreach_mul_(self._gradients(), self.config.clip / norm)
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
        for name, p in self.matrices.items():
            if self.muon.state[p]:
                state[f"{name}.momentum"] = self.muon.state[p]["momentum"].flatten().clone()
        for name, p in self.others.items():
            if self.adam.state[p]:
                state[f"{name}.first"] = self.adam.state[p]["exp_avg"].flatten().clone()
                state[f"{name}.second"] = self.adam.state[p]["exp_avg_sq"].flatten().clone()
        return state

    def import_state(self, state: dict[str, Tensor], updates: int) -> None:
        """Takes the state that `export_state`, or the Rust trainer, has left after so many updates.

        Raises `ValueError` for a moment that is missing or unknown.
        """
        if updates == 0 and not state:
            return
        state = dict(state)

        def take(name: str, p: nn.Parameter) -> Tensor:
            if name not in state:
                raise ValueError(f"the optimiser's state has no `{name}`")
            return state.pop(name).view_as(p).to(p.device, copy=True)

        for name, p in self.matrices.items():
            self.muon.state[p] = {"momentum": take(f"{name}.momentum", p)}
        for name, p in self.others.items():
            self.adam.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),
                "exp_avg": take(f"{name}.first", p),
                "exp_avg_sq": take(f"{name}.second", p),
            }
        if state:
            raise ValueError(f"the optimiser's state has `{min(state)}`, which belongs to no weight")

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in (*self.matrices.values(), *self.others.values()) if p.grad is not None]
