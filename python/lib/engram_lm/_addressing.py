"""Which addressing is meant: presets, configurations, checkpoints."""

import json
from array import array
from pathlib import Path
from typing import Any

from engram_lm._core import Addressing, classes_of_tokenizer
from engram_lm.config import MemoryConfig, load_model_config

# (layers, longest n-gram, rows per head before the search for a prime); 8 heads, pad 2, seed 0.
_PRESETS = {
    "demo": ([1, 15], 3, 646_400),
    "v41": ([1, 14], 4, 16_000_000),
}


def preset(name: str, tokenizer: Any, classes: Any, layer: int | None) -> Addressing:
    """`Addressing.preset`."""
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}: take one of {', '.join(_PRESETS)}")
    layers, max_order, rows = _PRESETS[name]
    config = {
        "seed": 0,
        "layers": layers,
        "max_order": max_order,
        "heads": 8,
        "base_rows": [rows] * (max_order - 1),
        "pad_id": 2,
    }
    return _chosen(Addressing._from_config(json.dumps(config), _classes(tokenizer, classes)), layer)


def from_config(path: Any, tokenizer: Any, classes: Any, layer: int | None) -> Addressing:
    """`Addressing.from_config`."""
    memory = load_model_config(path).memory
    if memory is None:
        raise ValueError(f"{path}: its model has no memory (`[model.memory]`)")
    return _chosen(of_memory(memory, tokenizer, classes), layer)


def from_checkpoint(path: Any, layer: int | None) -> Addressing:
    """`Addressing.from_checkpoint`."""
    folder = newest_checkpoint(Path(path))
    return from_config(folder / "run.toml", folder / "tokenizer.json", None, layer)


def of_memory(memory: MemoryConfig, tokenizer: Any, classes: Any = None) -> Addressing:
    """The addressing that a `[model.memory]` asks for, over a tokenizer's vocabulary."""
    config = {
        "seed": memory.seed,
        "layers": memory.layers,
        "max_order": memory.max_order,
        "heads": memory.heads,
        "base_rows": memory.rows_per_head,
        "pad_id": memory.pad_id,
    }
    found = _classes(tokenizer, classes)
    if memory.compression == "none" and classes is None:
        found = _identity(len(found))
    return Addressing._from_config(json.dumps(config), found)


def newest_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest one of a run's folder."""
    if (path / "manifest.json").is_file():
        return path
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [step for step in inside.glob("step-*") if (step / "manifest.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{path}: there is no checkpoint here; give the folder of a run or of a checkpoint")
    return max(found, key=lambda step: (len(step.name), step.name))


def _classes(tokenizer: Any, classes: Any) -> Any:
    if (tokenizer is None) == (classes is None):
        raise ValueError("give either `tokenizer`, the path of a tokenizer.json, or `classes`")
    if classes is None:
        path = Path(tokenizer)
        return classes_of_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    return _identity(classes) if isinstance(classes, int) else classes


def _identity(tokens: int) -> Any:
    return array("q", range(tokens))


def _chosen(addressing: Addressing, layer: int | None) -> Addressing:
    return addressing if layer is None else addressing.layer(layer)
