"""How rows learn: the optimisers of `TrainableTable` and of rows on a device, with their settings.

Every optimiser keeps state per row. Rows without a gradient keep values and state as they are; there is no weight
decay, which would touch every row. The learning rate is given with each update.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Adam:
    """Two moments per value: the lazy form, step for step PyTorch's `SparseAdam`."""

    kind: ClassVar[str] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class RowWiseAdam:
    """One second moment per row: 4 bytes of state whatever the width."""

    kind: ClassVar[str] = "row-wise-adam"
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class BalancedMomentum:
    """One moment per value, steps balanced between rows and columns: how DeepSeek-V4.1 trains its tables."""

    kind: ClassVar[str] = "balanced-momentum"
    momentum: float = 0.95
    iterations: int = 11
    floor: float = 1e-3
    scale: float = 0.18


@dataclass(frozen=True)
class Frozen:
    """Nothing is learned, and there is no state."""

    kind: ClassVar[str] = "frozen"


RowOptimizer = Adam | RowWiseAdam | BalancedMomentum | Frozen

_KINDS: dict[str, type[RowOptimizer]] = {kind.kind: kind for kind in (Adam, RowWiseAdam, BalancedMomentum, Frozen)}


def named(name: str) -> RowOptimizer:
    """The optimiser of this name with its usual settings: "adam", "row-wise-adam", "balanced-momentum", "frozen".

    Underscores, as in `train.memory.optimizer` of a configuration, are read as well.
    """
    kind = _KINDS.get(name.replace("_", "-"))
    if kind is None:
        raise ValueError(f"there is no row optimiser {name!r}: take one of {', '.join(_KINDS)}")
    return kind()


def to_json(optimizer: RowOptimizer | str) -> str:
    """The optimiser as table files and the compiled part know it."""
    chosen = named(optimizer) if isinstance(optimizer, str) else optimizer
    return json.dumps({"kind": chosen.kind, **asdict(chosen)})


def from_json(text: str) -> RowOptimizer:
    """The optimiser that `to_json` wrote."""
    settings: dict[str, Any] = json.loads(text)
    return _KINDS[settings.pop("kind")](**settings)
