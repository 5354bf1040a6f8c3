"""How each weight is trained, declared by the module that holds it.

A module knows which of its weights are matrices and where one tensor holds several side by side. It says so in
`declared`, by the weight's name, where it makes the weight, so that no optimiser has to guess from a name or a shape.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, nn


@dataclass(frozen=True)
class Matrices:
    """Muon trains a weight [..., in, out]: each of the matrices that it holds by itself. All of them decay.

    Leading dimensions count matrices, as for a stack of experts. The columns are equal groups, one per head, and each
    group is divided into parts such as a key and a value. A part's columns of all groups make up one matrix (a key
    projection of all heads), or, where heads are trained apart, one matrix per group.

        keys and values of two heads:   k0 k0 v0 | k1 k1 v1     groups 2, parts (2, 1)
        matrices:                       k0 k0 k1 k1 and v0 v1
        with heads apart:               k0 k0, k1 k1, v0 and v1
    """

    parts: tuple[int, ...]
    groups: int = 1
    stacked: int = 1  # matrices of equally many rows on top of each other

    def split(self, weight: Tensor, heads_apart: bool) -> list[Tensor]:
        """The matrices of `weight`: a batch [matrices, rows, columns] for every part."""
        count, rows, group = self._layout(weight)
        columns = weight.reshape(count, rows, self.groups, group).split(list(self.parts), -1)
        if heads_apart:
            return [part.transpose(1, 2).reshape(count * self.groups, rows, -1) for part in columns]
        return [part.reshape(count, rows, -1) for part in columns]

    def join(self, parts: list[Tensor], like: Tensor, heads_apart: bool) -> Tensor:
        """The weight, of the shape of `like`, of which `split` made `parts`."""
        count, rows, _ = self._layout(like)
        if heads_apart:
            columns = [part.reshape(count, self.groups, rows, -1).transpose(1, 2) for part in parts]
        else:
            columns = [part.reshape(count, rows, self.groups, -1) for part in parts]
        return (columns[0] if len(columns) == 1 else cat(columns, -1)).reshape(like.shape)

    def _layout(self, weight: Tensor) -> tuple[int, int, int]:
        """Matrices on top of each other, their rows, and the columns of a group."""
        rows, columns = weight.shape[-2:]
        if columns != self.groups * sum(self.parts) or rows % self.stacked:
            raise ValueError(f"a weight {list(weight.shape)} does not hold the matrices {self} that are declared")
        return weight.shape[:-2].numel() * self.stacked, rows // self.stacked, columns // self.groups


@dataclass(frozen=True)
class ByAdam:
    """Adam trains a weight. `decays`: matrices and embeddings do, norms, biases and scales do not."""

    decays: bool


WeightTraining = Matrices | ByAdam
DECAYING, STEADY = ByAdam(True), ByAdam(False)


def whole(columns: int) -> Matrices:
    """One matrix of `columns`."""
    return Matrices((columns,))


def of_heads(heads: int, *parts: int) -> Matrices:
    """For every one of `heads`, columns divided into `parts`."""
    return Matrices(parts, groups=heads)


def training_plan(model: nn.Module) -> dict[str, WeightTraining]:
    """How every weight of `model` that learns is trained, by its name.

    Raises `ValueError` for a weight that no module declares.
    """
    plan: dict[str, WeightTraining] = {}
    for prefix, module in model.named_modules():
        declared: Any = getattr(module, "declared", {})
        for name, parameter in module.named_parameters(prefix, recurse=False):
            own = name.rpartition(".")[2]
            if not parameter.requires_grad:
                continue
            if own not in declared:
                raise ValueError(f"no module declares how `{name}` is trained")
            plan[name] = declared[own]
    return plan
