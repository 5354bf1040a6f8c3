"""The training loop: the same steps, data order, schedules, metrics and checkpoints as the Rust trainer's."""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm import optimizers
from engram_lm._addressing import of_memory
from engram_lm._core import Addressing, blake3_of_file
from engram_lm.config import RunConfig, TrainConfig, to_toml
from engram_lm.data import Sampler, TokenShards, positions_of, stretches, token_bytes
from engram_lm.torch.checkpoint import Checkpoint, CheckpointWriter, absolute, save_tensors, table_name
from engram_lm.torch.first_weights import initialise
from engram_lm.torch.group import Group, TreeSum
from engram_lm.torch.model import LanguageModel
from engram_lm.torch.optimizer import Optimizer
from engram_lm.torch.owners import OwnedTable
from engram_lm.torch.rows import Fetched, Where

EVALUATED_WINDOWS, EVALUATED_TOKENS = 16, 1 << 14


@dataclass
class Options:
    """What a run may choose besides its configuration."""

    rows: Where = "store"  # where tables are: "store" or "device"
    compile: bool = False
    parts: int | None = None  # equal parts of a batch; none: its micro-batches, or as many as processes can share


@dataclass
class Batch:
    """This process's parts of a step's batch."""

    inputs: Tensor  # [windows, context]
    targets: Tensor  # [windows, context]
    positions: Tensor | None  # [windows, context], places in their documents, where those are apart
    ids: dict[int, list[Tensor]]  # of each memory layer, one tensor [windows of the part, context, slots] a part
    state: dict[str, int]  # of the sampler, after this batch


def parts_of(config: TrainConfig, parts: int | None, processes: int) -> list[int]:
    """Windows of each of the parts that a batch is computed in, one after another on each process.

    `parts`: so many equal ones. None: micro-batches, the last of which may have fewer windows; where processes cannot
    share those, equal parts that are no larger. Raises `ValueError` if there are none.
    """
    batch, at_once = config.batch, config.windows_at_once
    micro_batches = [min(at_once, batch - first) for first in range(0, batch, at_once)]
    if parts is None and len(micro_batches) % processes == 0:
        return micro_batches
    count = parts or math.lcm(len(micro_batches), processes)
    if batch % count or count % processes:
        raise ValueError(
            f"a batch of {batch} windows is not {count} equal parts for {processes} processes: set `--parts` to a "
            "multiple of the processes that divides `train.batch`"
        )
    return [batch // count] * count


class Trainer:
    """A run in progress."""

    def __init__(self, run: RunConfig, folder: Path, group: Group, options: Options) -> None:
        """Begins a run; see `begin` and `resume`."""
        if run.data is None or run.train is None:
            raise ValueError("the configuration has no [data] and [train]")
        if run.model.memory is not None and run.model.memory.lookup != "own":
            raise ValueError("`model.memory.lookup`: only `engram train` has the permuted control")
        if run.data.train is None:
            raise ValueError("`data.source`: only `engram train` mixes several sources; name one by `data.train`")
        self.run, self.folder, self.group, self.options = run, folder, group, options
        self.config: TrainConfig = run.train
        self.windows = parts_of(self.config, options.parts, group.size)
        per_rank = len(self.windows) // group.size
        self.mine = slice(group.rank * per_rank, (group.rank + 1) * per_rank)
        self.train = TokenShards(run.data.train)
        self.valid = None if run.data.valid is None else TokenShards(run.data.valid)
        for shards in (self.train, self.valid):
            if shards is not None:
                shards.check_tokenizer(run.data.tokenizer)
        if self.train.vocabulary != run.model.vocabulary:
            raise ValueError(
                f"{run.data.tokenizer} has {self.train.vocabulary} tokens, but `model.vocabulary` is "
                f"{run.model.vocabulary}: make them equal"
            )
        self.addressing: Addressing | None = None
        if run.model.memory is not None:
            self.addressing = of_memory(run.model.memory, run.data.tokenizer)
        self.step_count, self.tokens = 0, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.updates_before = 0  # of the run that this one continues (`engram train --continue`)
        self.sampler = self._sampler({})
        self.ahead: Batch | None = None
        self.model: LanguageModel
        self.tables: dict[int, OwnedTable]
        self.optimizer: Optimizer
        self._bytes: Any = None

    @staticmethod
    def begin(run: RunConfig, folder: Path, group: Group, options: Options, source: Path | None = None) -> "Trainer":
        """A new run in `folder`, which must not hold one; with the weights and memory of the checkpoint `source`."""
        if any((folder / "checkpoints").glob("step-*")):
            raise FileExistsError(f"{folder} holds a run: continue it with --resume, or choose another folder")
        self = Trainer(run, folder, group, options)
        if group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        group.barrier()
        if source is not None:
            checkpoint = Checkpoint(source, verify=group.rank == 0)
            self._check_same_model(checkpoint)
            self._load(checkpoint)
        else:
            self.model = LanguageModel(run.model, self.config.recompute)
            initialise(self.model, self.config.seed)
            self.model.to(group.device)
            self.tables = self._new_tables()
            self.optimizer = Optimizer(self.model, self.config.optimizer)
        self._compile()
        self.save()
        return self

    @staticmethod
    def resume(run: RunConfig, folder: Path, group: Group, options: Options) -> "Trainer":
        """Continues the newest checkpoint in `folder`, on whatever number of processes; the model must be the same."""
        self = Trainer(run, folder, group, options)
        checkpoint = Checkpoint(folder, verify=group.rank == 0)
        if checkpoint.run.model != run.model:
            raise ValueError(f"{folder}: the run's model is another than the configuration's [model]")
        self._check_tokenizer(checkpoint)
        state = checkpoint.state()
        if state["data"] != self.train.identity:
            raise ValueError(f"{run.data and run.data.train}: not the data that this run began with")
        self._load(checkpoint)
        self.step_count, self.tokens = state["step"], state["tokens"]
        self.skipped, self.skipped_in_a_row = state.get("skipped", 0), state.get("skipped_in_a_row", 0)
        self.updates_before = state.get("updates_before", 0)
        self.sampler = self._sampler(state["sampler"])
        updates = self.updates_before + self.step_count - self.skipped
        self.optimizer.import_state(checkpoint.tensors("optimizer.safetensors"), updates)
        if group.rank == 0:
            self._cut_metrics()
        self._compile()
        return self

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """One training step. Gives its line of the metrics.

        Where the loss or a gradient is not finite, the step is skipped: it counts, but weights, rows and their
        optimisers stay as they are. Raises `FloatingPointError` if more than `train.skip_limit` in a row are.
        """
        start = time.perf_counter()
        batch = self.ahead or self._draw()
        fetched = {layer: table.fetch(batch.ids[layer]) for layer, table in self.tables.items()}
        self.ahead = self._draw()
        if len(self.windows) == 1:
            for layer, table in self.tables.items():
                table.table.prefetch(self.ahead.ids[layer][0])
        loss = self._gradients(batch, fetched)
        norm = self.optimizer.norm()
        schedule = self.config.schedule.rate(self.step_count, self.config.steps)
        skipped = not (math.isfinite(loss) and math.isfinite(norm) and self._finite(fetched))
        if skipped:
            self._skip()
        else:
            self.skipped_in_a_row = 0
            self._learn(fetched, norm, schedule)
        self.optimizer.zero_grad()
        self.step_count += 1
        self.tokens += self.config.batch * self.run.model.context
        self.saved_state = batch.state
        return {
            "kind": "step",
            "step": self.step_count,
            "loss": loss if math.isfinite(loss) else None,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "schedule": schedule,
            "tokens": self.tokens,
            "epoch": self._sampler(batch.state).epochs,
            "seconds": time.perf_counter() - start,
            **({"skipped": True} if skipped else {}),
        }

    def _gradients(self, batch: Batch, fetched: dict[int, list[Fetched]]) -> float:
        """Leaves the gradients of a step's batch at weights and rows; gives its loss."""
        total, losses = TreeSum(), []
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for part in range(len(self.windows[self.mine])):
            rows = {layer: of_layer[part] for layer, of_layer in fetched.items()}
            losses.append(self._compute(batch, part, rows))
            total.add([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        gradients = total.total()
        self.group.sum_in_order(gradients)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        return self._mean(losses)

    def _compute(self, batch: Batch, part: int, rows: dict[int, Fetched]) -> Tensor:
        """Forward and backward of one of this process's parts; gives its loss."""
        windows = self.windows[self.mine]
        first = sum(windows[:part])
        here = slice(first, first + windows[part])
        positions = None if batch.positions is None else batch.positions[here]
        memory = {layer: fetched.embed() for layer, fetched in rows.items()}
        loss: Tensor
        with self._precision():
            loss, balance = self.compiled(batch.inputs[here], batch.targets[here], memory, None, positions)
        learned = loss if balance is None else loss + balance
        (learned * (windows[part] / self.config.batch)).backward()
        return loss.detach()

    def _finite(self, fetched: dict[int, list[Fetched]]) -> bool:
        """Whether all gradients of rows are finite, of all processes."""
        every = [part.grads for of_layer in fetched.values() for part in of_layer]
        wrong = sum(int(not bool(grads.isfinite().all())) for grads in every)
        return not self.group.sum(torch.tensor([wrong])).item()

    def _skip(self) -> None:
        """Takes no step. Raises `FloatingPointError` if there were too many of these in a row."""
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.config.skip_limit:
            raise FloatingPointError(
                f"training diverged at step {self.step_count}: too many steps in a row had a loss or gradient that is "
                "not finite (`train.skip_limit`); resume from the last checkpoint with lower rates "
                "(`train.optimizer`), or a longer warm-up"
            )
        self.skipped += 1
        for experts in self.model.experts():
            experts.loads = None

    def _learn(self, fetched: dict[int, list[Fetched]], norm: float, schedule: float) -> None:
        """Updates weights, the experts' balance and rows."""
        self.optimizer.step(schedule, norm)
        for experts in self.model.experts():
            if experts.loads is not None:
                self.group.sum(experts.loads)
        self.model.rebalance()
        rate = schedule * self.config.optimizer.adam_rate * self.config.memory.rate_factor
        for layer, table in self.tables.items():
            table.update(fetched[layer], rate)

    def _mean(self, losses: list[Tensor]) -> float:
        """The mean loss over all windows of all processes."""
        every = torch.zeros(len(self.windows), dtype=torch.float64)
        every[self.mine] = torch.stack(losses).double().cpu()
        return float(self.group.sum(every) @ torch.tensor(self.windows).double()) / self.config.batch

    def _precision(self) -> Any:
        """bf16 operands of matrix products where the configuration, or a GPU, asks for them."""
        device = self.group.device.type
        bf16 = self.config.precision == "bf16" or (self.config.precision == "auto" and device == "cuda")
        return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def _compile(self) -> None:
        self.model.train()
        self.compiled: Callable[..., tuple[Tensor, Tensor | None]] = self.model.losses
        if self.options.compile:
            self.compiled = torch.compile(self.model.losses)
        self.saved_state = self.sampler.state

    # --- held-out loss ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any] | None:
        """The held-out loss, none without held-out data; all processes take a share of the windows."""
        if self.valid is None or self.run.data is None:
            return None
        self.model.eval()
        context = self.run.model.context
        windows = stretches(context, self.config.evaluate_tokens, len(self.valid))
        most = min(max(EVALUATED_TOKENS // context, 1), EVALUATED_WINDOWS)
        # Windows of equal length in batches; a shorter one at the end, alone.
        equal = [list(group) for _, group in itertools.groupby(windows, lambda window: window[1])]
        pieces = [group[first : first + most] for group in equal for first in range(0, len(group), most)]
        if self._bytes is None:
            self._bytes = token_bytes(self.run.data.tokenizer)
        sums = torch.zeros(2, dtype=torch.float64)
        for turn in range(0, len(pieces), self.group.size):
            mine = turn + self.group.rank
            sums += self._evaluate_piece(self.valid, pieces[mine] if mine < len(pieces) else [])
        nats, found = self.group.sum(sums).tolist()
        count = sum(length for _, length in windows)
        self.model.train()
        return {
            "kind": "held_out",
            "step": self.step_count,
            "nats_per_token": nats / count,
            "bits_per_byte": nats / math.log(2) / max(found, 1),
            "tokens": count,
            "bytes": int(found),
        }

    def _evaluate_piece(self, valid: TokenShards, piece: list[tuple[int, int]]) -> Tensor:
        """Nats of some windows of equal length, and the bytes predicted. Without any, only takes part in the exchange
        of rows."""
        time_ = piece[0][1] if piece else 1
        tokens = np.stack([valid.read(start, time_ + 1) for start, _ in piece or [(0, 1)]])
        inputs, targets = (torch.from_numpy(w.copy()) for w in (tokens[:, :-1], tokens[:, 1:]))
        positions = self._positions(tokens[:, :-1])
        ids = self._row_ids(inputs, positions)
        memory = {layer: table.read(ids[layer]) for layer, table in self.tables.items()}
        if not piece:
            return torch.zeros(2, dtype=torch.float64)
        device = self.group.device
        on_device = None if positions is None else positions.to(device)
        with self._precision():
            logits = self.model.logits(inputs.to(device), memory, None, on_device)
        losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().to(device), reduction="none")
        found = float(self._bytes[tokens[:, 1:]].sum())
        return torch.tensor([losses.double().sum().item(), found], dtype=torch.float64)

    # --- data -------------------------------------------------------------------------------------------------------

    def _sampler(self, state: dict[str, int]) -> Sampler:
        return Sampler(self.config.seed, self.run.model.context, self.config.batch, len(self.train), **state)

    def _draw(self) -> Batch:
        """This process's windows of the next batch, and their row ids."""
        context, sizes = self.run.model.context, self.windows[self.mine]
        first = sum(self.windows[: self.mine.start])
        starts = self.sampler.next_starts()[first : first + sum(sizes)]
        windows = np.stack([self.train.read(start, context + 1) for start in starts])
        inputs, targets = (torch.from_numpy(w.copy()) for w in (windows[:, :-1], windows[:, 1:]))
        positions = self._positions(windows[:, :-1])
        ids = {layer: list(of_layer.split(sizes)) for layer, of_layer in self._row_ids(inputs, positions).items()}
        device = self.group.device
        on_device = None if positions is None else positions.to(device)
        return Batch(inputs.to(device), targets.to(device), on_device, ids, self.sampler.state)

    def _positions(self, inputs: "np.ndarray[Any, np.dtype[np.int64]]") -> Tensor | None:
        if not self.config.documents_apart:
            return None
        return torch.from_numpy(positions_of(inputs, self.train.end_of_text))

    def _row_ids(self, inputs: Tensor, positions: Tensor | None) -> dict[int, Tensor]:
        """Row ids of every memory layer, [windows, time, slots]."""
        if self.addressing is None:
            return {}
        starts = None if positions is None else positions == 0
        ids = {}
        for layer in self.addressing.layers:
            chosen = self.addressing.layer(layer)
            out = torch.empty(*inputs.shape, chosen.slots, dtype=torch.int64)
            ids[layer] = chosen.row_ids(inputs.contiguous(), starts=starts, out=out)
        return ids

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint, and removes those beyond the ones to keep. All processes call it together."""
        place = self.folder / "checkpoints"
        writer = CheckpointWriter(place, self.step_count, self.config.keep)
        tables = place / f".tables-{self.step_count}"
        if self.group.rank == 0:
            tables.mkdir(parents=True, exist_ok=True)
        self.group.barrier()
        for layer, table in self.tables.items():
            table.save(tables / table_name(layer))
        if self.group.rank == 0:
            with writer as unfinished:
                self._write(unfinished)
                for layer in self.tables:
                    os.replace(tables / table_name(layer), unfinished / table_name(layer))
            shutil.rmtree(tables)
        self.group.barrier()
        return writer.target

    def _write(self, folder: Path) -> None:
        assert self.run.data is not None
        (folder / "run.toml").write_text(to_toml(absolute(self.run)))
        shutil.copyfile(self.run.data.tokenizer, folder / "tokenizer.json")
        save_tensors(dict(self.model.state_dict()), folder / "model.safetensors")
        save_tensors(self.optimizer.export_state(), folder / "optimizer.safetensors")
        state = {
            "step": self.step_count,
            "tokens": self.tokens,
            "sampler": self.saved_state,
            "data": self.train.identity,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        if self.updates_before > 0:
            state["updates_before"] = self.updates_before
        if self.valid is not None:
            state["held_out"] = self.valid.identity
        (folder / "state.json").write_text(json.dumps(state, indent=2))

    def _load(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.model(self.group.device)
        self.model.recompute = self.config.recompute
        self.tables = {}
        if self.addressing is not None:
            for layer in self.addressing.layers:
                path, chosen = checkpoint.folder / table_name(layer), self.addressing.layer(layer)
                table = OwnedTable.open(path, self.group, chosen, self.options.rows, self._scratch())
                wanted = optimizers.configured(self.config.memory)
                if table.table.optimizer != wanted:
                    raise ValueError(f"{path}: has the state of {table.table.optimizer}, not of {wanted}")
                self.tables[layer] = table
        self.optimizer = Optimizer(self.model, self.config.optimizer)

    def _new_tables(self) -> dict[int, OwnedTable]:
        memory = self.run.model.memory
        if memory is None or self.addressing is None:
            return {}
        return {
            layer: OwnedTable.create(
                self.group,
                memory.row_width,
                self.addressing.layer(layer),
                optimizers.configured(self.config.memory),
                self.options.rows,
                memory.row_init,
                self.config.seed + layer,
                self._scratch(),
            )
            for layer in memory.layers
        }

    def _scratch(self) -> Path | None:
        return self.folder if self.config.memory.storage == "mapped" else None

    def _check_same_model(self, checkpoint: Checkpoint) -> None:
        if checkpoint.run.model != self.run.model:
            raise ValueError(f"{checkpoint.folder}: its [model] is another; only the same model can be continued here")
        self._check_tokenizer(checkpoint)

    def _check_tokenizer(self, checkpoint: Checkpoint) -> None:
        if self.run.data and blake3_of_file(checkpoint.folder / "tokenizer.json") != self.train.tokenizer:
            raise ValueError(f"{self.run.data.tokenizer}: not the tokenizer of {checkpoint.folder}")

    def _cut_metrics(self) -> None:
        """Removes what the log says of steps after the checkpoint: they come again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step_count]
            path.write_text("".join(kept))
