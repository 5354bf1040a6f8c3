"""What a run would need, without starting it."""

import os
from dataclasses import dataclass

import torch

from engram_lm import optimizers, table_file
from engram_lm._addressing import of_memory
from engram_lm.config import ModelConfig, TrainConfig, load_run_config
from engram_lm.torch.model import LanguageModel
from engram_lm.torch.training import Matrices, training_plan

GIB = 1 << 30
DEVICE_GIB = 141.0  # of one H200


@dataclass
class Plan:
    """Bytes on one rank, and bytes that it sends in a step."""

    weights: int
    gradients: int
    optimizer: int
    rows: int
    row_state: int
    activations: int
    sent_rows: int
    sent_gradients: int
    dense_parameters: int
    row_parameters: int
    ranks: int

    @property
    def on_device(self) -> int:
        """With rows in host memory."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def on_host(self) -> int:
        """Rows and their state, with rows in host memory."""
        return self.rows + self.row_state

    def __str__(self) -> str:
        def gib(count: int) -> str:
            return f"{count / GIB:10.2f} GiB"

        whole = self.on_device + self.on_host
        fits = [
            f"rows in host memory: {'fits' if self.on_device / GIB < DEVICE_GIB else 'does not fit'}"
            f" a device of {DEVICE_GIB:.0f} GiB ({self.on_device / GIB:.1f} GiB, and {self.on_host / GIB:.1f} GiB of"
            " the host's)",
            f"rows on the device:  {'fits' if whole / GIB < DEVICE_GIB else 'does not fit'}"
            f" a device of {DEVICE_GIB:.0f} GiB ({whole / GIB:.1f} GiB)",
        ]
        lines = [
            f"{self.dense_parameters / 1e9:.3f} B weights, {self.row_parameters / 1e9:.3f} B values in memory rows",
            f"on each of {self.ranks} rank{'s' if self.ranks > 1 else ''}:",
            f"  weights (f32, a copy on each)   {gib(self.weights)}",
            f"  gradients (f32)                 {gib(self.gradients)}",
            f"  optimiser of the weights        {gib(self.optimizer)}",
            f"  activations, estimated          {gib(self.activations)}",
            f"  memory rows (f32, shared)       {gib(self.rows)}",
            f"  optimiser of the rows           {gib(self.row_state)}",
            "sent by each rank in a step:",
            f"  ids, rows and their gradients   {gib(self.sent_rows)}",
            f"  gradients of the weights        {gib(self.sent_gradients)}",
            *fits,
        ]
        return "\n".join(lines)


def plan(path: str | os.PathLike[str], ranks: int) -> Plan:
    """The plan of the configuration at `path` on `ranks` processes.

    Raises `ValueError` if the configuration has no [train], or the batch does not divide.
    """
    run = load_run_config(path)
    if run.train is None:
        raise ValueError(f"{path}: has no [train], and so nothing to plan")
    if ranks < 1 or run.train.batch % ranks:
        raise ValueError(f"a batch of {run.train.batch} windows does not divide into {ranks} processes")
    with torch.device("meta"):
        model = LanguageModel(run.model)
    named = list(model.named_parameters())
    dense = sum(p.numel() for _, p in named)
    by_muon = {name for name, training in training_plan(model).items() if isinstance(training, Matrices)}
    matrices = sum(p.numel() for name, p in named if name in by_muon)
    memory = run.model.memory
    row_values = row_state = sent_rows = 0
    if memory is not None:
        rows = sum(len_of_layers(run.model))
        row_values = rows * memory.row_width
        widths = table_file.state_widths(optimizers.configured(run.train.memory), memory.row_width)
        row_state = rows * sum(widths)
        read = run.train.batch // ranks * run.model.context * memory.slots * len(memory.layers)
        # Every row that is read, at most: its id, its values, and its gradient; none goes to oneself.
        sent_rows = read * (8 + 8 * memory.row_width) * (ranks - 1) // ranks
    sent = 8 * dense * (ranks - 1) // ranks if ranks > 1 else 0
    return Plan(
        weights=4 * dense,
        gradients=4 * dense,
        optimizer=4 * matrices + 8 * (dense - matrices),
        rows=4 * row_values // ranks,
        row_state=4 * row_state // ranks,
        activations=_activations(run.model, run.train, ranks),
        sent_rows=sent_rows,
        sent_gradients=sent,
        dense_parameters=dense,
        row_parameters=row_values,
        ranks=ranks,
    )


def len_of_layers(model: ModelConfig) -> list[int]:
    """Rows of every memory layer's table."""
    if model.memory is None:
        return []
    addressing = of_memory(model.memory, None, model.vocabulary)
    return [addressing.layer(layer).rows for layer in addressing.layers]


def _activations(model: ModelConfig, train: TrainConfig, ranks: int) -> int:
    """Bytes kept of a part of the batch for its backward pass: an estimate within a factor of two.

    Of every block, some 30 values of the residual's width for each stream-free token, and the streams themselves; with
    `recompute`, the streams between blocks only, and one block. The logits come twice.
    """
    tokens = min(train.windows_at_once, -(-train.batch // ranks)) * model.context
    streams = 4 * tokens * model.streams * model.width
    block = 30 * 4 * tokens * model.width + 4 * streams
    kept = model.blocks * (streams if train.recompute else block) + (block if train.recompute else 0)
    return kept + 2 * 4 * tokens * model.vocabulary
