"""How rows learn: the optimisers of `TrainableTable` and of rows on a device, with their settings.

Every optimiser keeps state per row. Rows without a gradient keep values and state as they are; there is no weight
decay, which would touch every row. The learning rate is given with each update.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from engram_lm.config import RowTraining


@dataclass(frozen=True)
class Adam:
    """Two moments per value: the lazy form, step for step PyTorch's `SparseAdam`."""

    kind: ClassVar[str] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True)
class AdamByRow:
    """As Adam, but each row's moments are corrected by the count of its own updates, so that a row that is first
    touched late takes its first steps as one that is touched at once: step for step PyTorch's `Adam` on that row."""

    kind: ClassVar[str] = "adam-by-row"
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


RowOptimizer = Adam | AdamByRow | RowWiseAdam | BalancedMomentum | Frozen

_KINDS: dict[str, type[RowOptimizer]] = {
    kind.kind: kind for kind in (Adam, AdamByRow, RowWiseAdam, BalancedMomentum, Frozen)
}


def named(name: str) -> RowOptimizer:
    """The optimiser of this name with its usual settings: "adam", "adam-by-row", "row-wise-adam", "balanced-momentum",
    "frozen".

    Underscores, as in `train.memory.optimizer` of a configuration, are read as well.
    """
    kind = _KINDS.get(name.replace("_", "-"))
    if kind is None:
        raise ValueError(f"there is no row optimiser {name!r}: take one of {', '.join(_KINDS)}")
    return kind()


def configured(training: RowTraining) -> RowOptimizer:
    """The optimiser that `[train.memory]` of a configuration names, with its settings."""
    named_settings = ("beta1", "beta2", "epsilon")
    settings: dict[str, Any] = {
        name: value for name in named_settings if (value := getattr(training, name)) is not None
    }
    name = "adam_by_row" if training.bias_correction == "row" else training.optimizer
    return _KINDS[name.replace("_", "-")](**settings)


def to_json(optimizer: RowOptimizer | str) -> str:
    """The optimiser as table files and the compiled part know it."""
    chosen = named(optimizer) if isinstance(optimizer, str) else optimizer
    return json.dumps({"kind": chosen.kind, **asdict(chosen)})


def from_json(text: str) -> RowOptimizer:
    """The optimiser that `to_json` wrote."""
    settings: dict[str, Any] = json.loads(text)
    return _KINDS[settings.pop("kind")](**settings)
