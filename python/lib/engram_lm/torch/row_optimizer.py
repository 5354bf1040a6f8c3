"""How rows on a device learn: the same steps as the store's, in PyTorch.

All functions work on the rows of a batch, [distinct, width] each, in place of the values and state that were gathered.
"""

import math

import torch
from torch import Tensor

from engram_lm.optimizers import Adam, AdamByRow, BalancedMomentum, Frozen, RowOptimizer, RowWiseAdam


def step(optimizer: RowOptimizer, number: int, rate: float, rows: Tensor, state: list[Tensor], grads: Tensor) -> None:
    """Step `number` (from 1) at `rate` on `rows` [distinct, width] with `state` and `grads`; rows and state change."""
    if isinstance(optimizer, Adam):
        _adam(optimizer, number, rate, rows, state, grads)
    elif isinstance(optimizer, AdamByRow):
        _adam_by_row(optimizer, rate, rows, state, grads)
    elif isinstance(optimizer, RowWiseAdam):
        _row_wise(optimizer, rate, rows, state[0], grads)
    elif isinstance(optimizer, BalancedMomentum):
        _balanced(optimizer, rate, rows, state[0], grads)
    else:
        assert isinstance(optimizer, Frozen)


def _adam(o: Adam, number: int, rate: float, rows: Tensor, state: list[Tensor], grads: Tensor) -> None:
    first, second = state
    size = rate * math.sqrt(1 - o.beta2**number) / (1 - o.beta1**number)
    first.lerp_(grads, 1 - o.beta1)
    second.lerp_(grads.square(), 1 - o.beta2)
    rows.sub_(first / second.sqrt().add_(o.epsilon), alpha=size)


def _adam_by_row(o: AdamByRow, rate: float, rows: Tensor, state: list[Tensor], grads: Tensor) -> None:
    first, second, count = state[0], state[1][:, :-1], state[1][:, -1:]
    count += 1
    updates = count.double()
    root, size = (1 - o.beta2**updates).sqrt(), 1 - o.beta1**updates
    first.lerp_(grads, 1 - o.beta1)
    second.lerp_(grads.square(), 1 - o.beta2)
    # PyTorch's Adam adds ε to the corrected root, its SparseAdam to the root as it is.
    corrected = first / second.sqrt().add_((o.epsilon * root).to(rows.dtype))
    rows.sub_(corrected * (rate * root / size).to(rows.dtype))


def _row_wise(o: RowWiseAdam, rate: float, rows: Tensor, second: Tensor, grads: Tensor) -> None:
    mean = grads.square().mean(-1, keepdim=True)
    second.copy_(torch.where(second == 0, mean, second + (1 - o.beta2) * (mean - second)))
    rows.sub_(grads * (rate / (second.sqrt() + o.epsilon)))


def _balanced(o: BalancedMomentum, rate: float, rows: Tensor, momentum: Tensor, grads: Tensor) -> None:
    momentum.mul_(o.momentum).add_(grads)
    update = (grads + o.momentum * momentum).double()
    if not len(update):
        return
    norms = update.square().mean(-1, keepdim=True).sqrt()
    alive = norms > o.floor * norms.square().mean().sqrt()
    by_row, by_column = alive.double(), torch.ones_like(update[:1])
    for turn in range(o.iterations):
        if turn % 2 == 0:
            norm = (update * by_column).square().mean(-1, keepdim=True).sqrt()
            by_row = torch.where(alive, _inverse(norm), 0.0)
        else:
            squares = (update * by_row).square().sum(0, keepdim=True)
            by_column = _inverse((squares / alive.sum()).sqrt())
    rows.sub_((update * by_row * by_column * (rate * o.scale)).to(rows.dtype))


def _inverse(norm: Tensor) -> Tensor:
    """1/norm; 0 where all is zero, which stays zero."""
    return torch.where(norm > 0, norm.reciprocal(), 0.0)
