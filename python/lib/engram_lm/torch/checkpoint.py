"""Checkpoints: folders that are whole or not there, the same that the Rust trainer writes and reads.

| file | what |
|---|---|
| `run.toml`, `tokenizer.json` | configuration and tokenizer |
| `model.safetensors` | weights, f32, by name |
| `optimizer.safetensors` | state of Muon and Adam, by name and moment |
| `memory.layerL.table` | rows of memory layer L and their optimiser's state |
| `state.json` | step, tokens seen, position in the data |
| `manifest.json` | size and BLAKE3 of each file above |
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engram_lm._addressing import newest_checkpoint
from engram_lm._core import Addressing, DamagedError, blake3_of_file
from engram_lm.config import RunConfig, load_run_config
from engram_lm.torch.model import LanguageModel
from engram_lm.torch.rows import RowTable, Where

FORMAT = 1


def table_name(layer: int) -> str:
    """The table file of block `layer`."""
    return f"memory.layer{layer}.table"


class Checkpoint:
    """A complete checkpoint, verified: every file has the size and the hash that the manifest gives."""

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        """Opens `path`: a checkpoint, or a run's folder, whose newest is taken.

        Raises `FileNotFoundError` if there is none, `DamagedError` if a file is missing, truncated or changed.
        """
        self.folder = newest_checkpoint(Path(path))
        manifest = json.loads((self.folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{self.folder}: its format is {manifest['format']}, this program reads {FORMAT}")
        if verify:
            for name, expected in manifest["files"].items():
                self._verify(self.folder / name, expected)
        self.run = load_run_config(self.folder / "run.toml")

    @staticmethod
    def _verify(path: Path, expected: dict[str, Any]) -> None:
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise DamagedError(f"{path}: missing or not of its {expected['bytes']} bytes; restore it from a copy")
        if blake3_of_file(path) != expected["blake3"]:
            raise DamagedError(f"{path}: its contents have changed; restore it from a copy")

    def model(self, device: torch.device | str = "cpu") -> LanguageModel:
        """The model with its weights."""
        recompute = self.run.train is not None and self.run.train.recompute
        model = LanguageModel(self.run.model, recompute)
        model.load_state_dict(self.tensors("model.safetensors"), strict=True)
        return model.to(device)

    def addressing(self) -> Addressing:
        """The addressing of its memory. Raises `ValueError` if it has none."""
        return Addressing.from_checkpoint(self.folder)

    def tables(self, where: Where = "store", device: torch.device | str = "cpu", **options: Any) -> dict[int, RowTable]:
        """The table of every memory layer, with its optimiser's state; options as in `RowTable.open`."""
        memory = self.run.model.memory
        if memory is None:
            return {}
        addressing = self.addressing()
        return {
            layer: RowTable.open(
                self.folder / table_name(layer),
                where=where,
                device=device,
                addressing=addressing.layer(layer),
                **options,
            )
            for layer in memory.layers
        }

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, by their names of today."""
        # Forms of memory without gates were a field of their own.
        return {name.replace(".ngrams.", ".memory."): tensor for name, tensor in load_file(self.folder / name).items()}

    def state(self) -> dict[str, Any]:
        """Step, tokens and position in the data. Raises `FileNotFoundError` for a model trained elsewhere."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state


class CheckpointWriter:
    """A checkpoint being written, as a context: put in place when the block ends, removed if it raises.

    with CheckpointWriter(folder, step, keep=2) as folder:
        ...  # write files into `folder`
    """

    def __init__(self, folder: str | os.PathLike[str], step: int, keep: int = 2) -> None:
        self.place, self.keep = Path(folder), max(keep, 1)
        self.target = self.place / f"step-{step:08}"
        self.unfinished = self.place / f".unfinished-{self.target.name}"

    def __enter__(self) -> Path:
        self.place.mkdir(parents=True, exist_ok=True)
        for left in self.place.glob(".unfinished-*"):
            shutil.rmtree(left)
        self.unfinished.mkdir()
        return self.unfinished

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            return
        files = {}
        for path in sorted(self.unfinished.iterdir()):
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "blake3": blake3_of_file(path)}
        manifest = self.unfinished / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
        _flush(manifest)
        if self.target.exists():
            shutil.rmtree(self.target)  # the same step again, after a resume from an earlier one
        os.replace(self.unfinished, self.target)
        steps = [step for step in self.place.glob("step-*") if (step / "manifest.json").is_file()]
        for old in sorted(steps, key=lambda step: (len(step.name), step.name))[: -self.keep]:
            shutil.rmtree(old)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors as f32 in the safetensors format."""
    save_file({name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}, path)


def absolute(run: RunConfig) -> RunConfig:
    """The configuration with paths that do not depend on where it lies."""
    if run.data is not None:
        run.data.map_paths(Path.absolute)
    return run


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
