"""Adapters and overlays as the commands `engram graft` and `engram teach` write them.

An adapter is a folder with `adapter.toml` (the model that it belongs to, and the memory's configuration),
`memory.safetensors` (weights by the names of a checkpoint) and `memory.layerL.table` (rows; no file where all are
zero). An overlay is a folder with `overlay.toml`, `memory.layerL.overlay` (a few changed rows) and, where it brings its
memory with it, `adapter/`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engram_lm import config, table_file, toml_file
from engram_lm._addressing import of_memory
from engram_lm._core import Addressing, AddressMismatch, FormatError, Table, blake3_of, table_info
from engram_lm.config import MemoryConfig
from engram_lm.optimizers import Frozen

FORMAT = 1
ABOUT = "adapter.toml"
WEIGHTS = "memory.safetensors"
OVERLAY_ABOUT = "overlay.toml"


@dataclass(frozen=True)
class About:
    """`adapter.toml`."""

    format: int
    model: str
    model_name: str
    tokenizer: str
    addressing: str
    rows: Literal["zero", "tables"]
    memory: MemoryConfig


@dataclass(frozen=True)
class OverlayAbout:
    """`overlay.toml`."""

    format: int
    model: str
    model_name: str
    tokenizer: str
    addressing: str
    memory: str
    notes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Adapter:
    """A memory for a model that exists, and overlays on its rows, the lowest first."""

    folder: Path
    text: str
    about: About
    addressing: Addressing
    overlays: tuple[Path, ...]

    def table(self, layer: int) -> Table:
        """The rows of the memory before block `layer`, under the overlays."""
        names = [folder / f"memory.layer{layer}.overlay" for folder in self.overlays]
        overlays = [path for path in names if path.is_file()]
        addressing, width = self.addressing.layer(layer), self.about.memory.row_width
        if self.about.rows == "zero":
            return Table.zeros(width, addressing=addressing, overlays=overlays, stack=True)
        path = self.folder / f"memory.layer{layer}.table"
        return Table.open(path, addressing=addressing, overlays=overlays, stack=True)

    def trained_table(self, layer: int) -> Path | None:
        """The table file of `layer`, if it has the state of an optimiser and nothing lies on it."""
        path = self.folder / f"memory.layer{layer}.table"
        if self.overlays or self.about.rows == "zero" or "optimizer" not in table_info(path):
            return None
        return None if isinstance(table_file.read_header(path).optimizer, Frozen) else path

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.folder / WEIGHTS


def is_at(folder: Path) -> bool:
    """Whether an adapter or an overlay stands at `folder`."""
    return (folder / ABOUT).is_file() or (folder / OVERLAY_ABOUT).is_file()


def load(folder: Path, tokenizer: str | os.PathLike[str], overlays: Sequence[str | os.PathLike[str]] = ()) -> Adapter:
    """Opens the adapter in `folder`, or the overlay there with the adapter that it brings with it.

    `tokenizer`: path of the tokenizer.json of the model. `overlays`: folders of overlays to lay on top, the lowest
    first. Whether the model is the one that the adapter was made for cannot be told from here; tokenizer, rows and
    overlays are checked.

    Raises `FormatError`; `AddressMismatch` if one does not belong to the tokenizer or to what lies below;
    `ConfigError`, `OSError`.
    """
    layers = [Path(overlay) for overlay in overlays]
    if (folder / OVERLAY_ABOUT).is_file():
        inside = folder / "adapter"
        if not (inside / ABOUT).is_file():
            raise ValueError(
                f"{folder}: it changes rows of an adapter, which it does not bring with it: name the adapter"
            )
        folder, layers = inside, [folder, *layers]
    path = folder / ABOUT
    about = config.load_table(About, path)
    _check_format(path, about.format)
    addressing = of_memory(about.memory, tokenizer)
    _check_addressing(path, about.addressing, addressing)
    adapter = Adapter(folder, path.read_text(), about, addressing, tuple(layers))
    for layer in layers:
        _check_overlay(layer / OVERLAY_ABOUT, adapter)
    return adapter


def identity(adapter: Adapter) -> str:
    """What tells this memory from others: the BLAKE3 hash of its addressing, its configuration and its weights."""
    memory = adapter.text.partition("[memory]\n")[2].encode()
    parts = [bytes.fromhex(adapter.addressing.identity), len(memory).to_bytes(8, "little"), memory]
    return blake3_of(b"".join([*parts, adapter.weights.read_bytes()]), "engram adapter 1")


def text_of_tables(adapter: Adapter) -> str:
    """`adapter.toml` of the same memory with its rows in tables."""
    document = toml_file.Source(adapter.folder / ABOUT).document
    return toml_file.to_toml({**document, "rows": "tables"})


def _check_overlay(path: Path, adapter: Adapter) -> None:
    about = config.load_table(OverlayAbout, path)
    _check_format(path, about.format)
    if about.memory == "base":
        raise AddressMismatch(f"{path}: it changes rows of the model's own memory, but this is an adapter's")
    _check_addressing(path, about.addressing, adapter.addressing)
    found = identity(adapter)
    if about.memory != found:
        raise AddressMismatch(
            f"{path}: it was made for the memory {about.memory[:12]}, but {adapter.folder} is {found[:12]}: use the "
            "adapter that it was made for"
        )


def _check_format(path: Path, found: int) -> None:
    if found != FORMAT:
        raise FormatError(f"{path}: its format is {found}, this program reads {FORMAT}")


def _check_addressing(path: Path, made: str, addressing: Addressing) -> None:
    if made != addressing.identity:
        raise AddressMismatch(
            f"{path}: its rows were made for the addressing {made[:12]}, but with this tokenizer the memory has the "
            f"addressing {addressing.identity[:12]}: use the tokenizer.json of the model that it was made for"
        )
