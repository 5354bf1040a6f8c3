"""Tables of rows that a model reads and that learn row by row, on the device or in our store.

Rows live outside of autodiff. There are two ways to use a table:

* **Fetch, compute, update.** `fetched = table.fetch(ids)` has each distinct row once, as a leaf of the graph; the model
  reads `fetched.embed()`; after `backward`, `table.update(fetched, rate)` teaches those rows.
* **As a layer.** `table(ids)` gives rows; their gradients come back to the table in `backward`, and `table.step(rate)`
  teaches them. This works under `torch.compile(fullgraph=True)` and autocast.

No gradient is ever the size of the table.
"""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm import optimizers, table_file
from engram_lm._core import Addressing, Table, TrainableTable, distinct
from engram_lm.optimizers import BalancedMomentum, RowOptimizer
from engram_lm.torch import row_optimizer

NO_IDENTITY = "0" * 64
CACHED_VALUES = 1 << 16  # of rows that learn at once on a CPU
Where = Literal["store", "device"]


class Fetched:
    """The rows of a batch: each distinct row once, and which of them stands where."""

    def __init__(self, ids: Tensor, index: Tensor, rows: Tensor) -> None:
        self.ids = ids  # [distinct], ascending; where the table keeps its ids
        self.index = index  # int64, the shape of the batch's ids, on the model's device
        self.rows = rows  # [distinct, width] on the model's device, a leaf of the graph

    def embed(self, select: slice | None = None) -> Tensor:
        """e [..., slots·width] for ids [..., slots]; `select` takes some of the first dimension."""
        index = self.index if select is None else self.index[select]
        return F.embedding(index, self.rows).flatten(-2)

    @property
    def grads(self) -> Tensor:
        """Gradients of the distinct rows, [distinct, width]; zeros where nothing came back."""
        return torch.zeros_like(self.rows) if self.rows.grad is None else self.rows.grad


class RowTable(nn.Module, ABC):
    """A table of rows, `rows` × `width` float32, with a row optimiser. Made by `create` and `open`."""

    @property
    @abstractmethod
    def place(self) -> torch.device:
        """The device that rows are given to the model on."""

    def __init__(self, rows: int, width: int, optimizer: RowOptimizer, identity: str, layer: int) -> None:
        super().__init__()
        self.rows, self.width, self.optimizer = rows, width, optimizer
        self.identity, self.layer = identity, layer
        # What `backward` brought back: ids [n] and gradients [n, width], occurrence by occurrence.
        self._returned: list[tuple[Tensor, Tensor]] = []
        # Rows do not require gradients; this does, so that the graph of what reads them leads here.
        self._anchor = torch.zeros((), requires_grad=True)
        self._handle = next(_handles)
        _tables[self._handle] = self

    @staticmethod
    def create(
        width: int,
        rows: int | None = None,
        *,
        where: Where = "store",
        device: torch.device | str = "cpu",
        optimizer: RowOptimizer | str = "adam",
        addressing: Addressing | None = None,
        deviation: float = 0.0,
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
    ) -> "RowTable":
        """A new table at step 0: of `rows`, or of the rows that the `addressing`'s chosen layer has.

        `where`: "store", in host memory (or, with `folder`, in a mapped file there), or "device", on `device`. Rows are
        given to the model on `device` in either case. `deviation`, `seed`: rows begin as normal values, the same in
        both; 0: as zeros.
        """
        chosen = optimizers.named(optimizer) if isinstance(optimizer, str) else optimizer
        if where == "store":
            table = TrainableTable.create(
                width, rows, optimizer=chosen, addressing=addressing, deviation=deviation, seed=seed, folder=folder
            )
            return StoreRows(table, device)
        count = rows if addressing is None else addressing.rows
        if count is None or (rows is not None and rows != count):
            raise ValueError(f"`rows` is {rows}, and the addressing's layer has {count}: give one of the two")
        identity = NO_IDENTITY if addressing is None else addressing.identity
        layer = 0 if addressing is None else addressing.layer_id
        made = DeviceRows(count, width, chosen, identity, layer, device)
        if deviation:
            made.fill(deviation, seed)
        return made

    @staticmethod
    def open(
        path: str | os.PathLike[str],
        *,
        where: Where = "store",
        device: torch.device | str = "cpu",
        addressing: Addressing | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> "RowTable":
        """The table that `save` wrote, or a checkpoint's `memory.layerL.table`: rows, state and step."""
        if where == "store":
            return StoreRows(TrainableTable.open(path, addressing=addressing, folder=folder), device)
        header, sections = table_file.open_sections(path)
        if addressing is not None and (header.identity, header.layer) != (addressing.identity, addressing.layer_id):
            # Raises what says so.
            TrainableTable.open(path, addressing=addressing)
        made = DeviceRows(header.rows, header.width, header.optimizer, header.identity, header.layer, device)
        made.take_sections(header.step, sections)
        return made

    # --- fetch, compute, update -----------------------------------------------------------------------------------

    @abstractmethod
    def fetch(self, ids: Tensor) -> Fetched:
        """The rows `ids` [..., slots] int64; those that were prefetched by the same tensor are there already."""

    @abstractmethod
    def prefetch(self, ids: Tensor) -> None:
        """Begins to fetch rows that `fetch` will ask for by the same ids; a hint."""

    @abstractmethod
    def learn(self, ids: Tensor, grads: Tensor, rate: float) -> None:
        """One optimiser step on rows `ids` [n] with `grads` [n, width]; gradients of the same row are added."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes rows, state and step as a table file, whole or not at all."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Updates made so far."""

    def update(self, fetched: Fetched, rate: float) -> None:
        """One optimiser step on the rows of `fetched`, whose gradients `backward` has left."""
        self.learn(fetched.ids, fetched.grads, rate)

    # --- as a layer -------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [...] int64. In training, `backward` brings their gradients back: see `step`."""
        rows: Tensor = torch.ops.engram_lm.read_rows(ids, self._anchor, self.width, self._handle)
        return rows

    def step(self, rate: float) -> None:
        """One optimiser step on the rows whose gradients came back since the last one."""
        returned, self._returned = self._returned, []
        if returned:
            ids, grads = (torch.cat(parts) for parts in zip(*returned, strict=True))
            self.learn(ids, grads, rate)
        else:
            empty = torch.empty(0, dtype=torch.int64)
            self.learn(empty, torch.empty(0, self.width), rate)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients that came back and were not learned from."""
        self._returned = []

    @abstractmethod
    def read(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [...], outside of the graph, where the model is."""

    def _take_back(self, ids: Tensor, grads: Tensor) -> None:
        self._returned.append((ids.flatten(), grads.reshape(-1, self.width).float()))

    def extra_repr(self) -> str:
        """For `print`."""
        return f"{self.rows} rows of {self.width} values, {self.optimizer}"


_handles = count()
_tables: "weakref.WeakValueDictionary[int, RowTable]" = weakref.WeakValueDictionary()


@torch.library.custom_op("engram_lm::read_rows", mutates_args=())
def _read_rows(ids: Tensor, anchor: Tensor, width: int, table: int) -> Tensor:
    return _tables[table].read(ids)


@_read_rows.register_fake
def _(ids: Tensor, anchor: Tensor, width: int, table: int) -> Tensor:
    return torch.empty(*ids.shape, width, dtype=torch.float32, device=_tables[table].place)


@torch.library.custom_op("engram_lm::return_rows", mutates_args=())
def _return_rows(ids: Tensor, grads: Tensor, anchor: Tensor, table: int) -> Tensor:
    _tables[table]._take_back(ids, grads)
    # The anchor's gradient: as long as somebody wants it, this operation is not removed as dead.
    return torch.zeros_like(anchor)


@_return_rows.register_fake
def _(ids: Tensor, grads: Tensor, anchor: Tensor, table: int) -> Tensor:
    return torch.zeros_like(anchor)


def _save_ids(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, anchor, _, table = inputs
    ctx.save_for_backward(ids, anchor)
    ctx.table = table


def _bring_back(ctx: Any, grads: Tensor) -> tuple[None, Tensor, None, None]:
    ids, anchor = ctx.saved_tensors
    return None, torch.ops.engram_lm.return_rows(ids, grads.contiguous(), anchor, ctx.table), None, None


_read_rows.register_autograd(_bring_back, setup_context=_save_ids)


class StoreRows(RowTable):
    """Rows in our store: in host memory, or mapped from a file. They are fetched on threads without the GIL."""

    def __init__(self, table: TrainableTable, device: torch.device | str = "cpu") -> None:
        super().__init__(table.rows, table.width, table.optimizer, table.identity, table.layer)
        self.table, self._place = table, torch.device(device)
        self._ahead: tuple[Tensor, Future[tuple[Tensor, Tensor, Tensor]]] | None = None
        self._thread = ThreadPoolExecutor(1, "row-prefetch")
        self._pinned = _PinnedPair(table.width) if self.place.type == "cuda" else None

    @property
    def place(self) -> torch.device:
        """The device that rows are given to the model on."""
        return self._place

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return self.table.step

    def fetch(self, ids: Tensor) -> Fetched:
        """The rows `ids` [..., slots] int64."""
        if self._ahead is not None and self._ahead[0] is ids:
            found = self._ahead[1].result()
            self._ahead = None
        else:
            found = self._gather(ids)
        distinct_ids, index, rows = found
        if self._pinned is None:
            return Fetched(distinct_ids, index.to(self.place), rows.to(self.place).requires_grad_())
        on_device = rows.to(self.place, non_blocking=True)
        self._pinned.copied(rows)
        return Fetched(distinct_ids, index.to(self.place, non_blocking=True), on_device.requires_grad_())

    def prefetch(self, ids: Tensor) -> None:
        """Begins to fetch on another thread. An update meanwhile is seen: the rows that it changed are read again."""
        self._ahead = (ids, self._thread.submit(self._gather, ids))

    def learn(self, ids: Tensor, grads: Tensor, rate: float) -> None:
        """One optimiser step; see `RowTable.learn`."""
        ids, grads = ids.cpu(), grads.detach().float().cpu().contiguous()
        self.table.update(ids, grads, rate)
        if self._ahead is not None:
            self._refresh(*self._ahead[1].result()[::2], ids)

    def read(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [...]."""
        out = torch.empty(*ids.shape, self.width)
        self.table.gather(ids.cpu().contiguous(), out)
        return out.to(self.place)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table file."""
        self.table.save(path)

    def _gather(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct ids, index and rows on the host."""
        listed, index = (torch.from_numpy(np.asarray(part)) for part in distinct(ids.cpu().contiguous()))
        pinned = self._pinned
        rows = torch.empty(len(listed), self.width) if pinned is None else pinned.take(len(listed))
        self.table.gather(listed, rows)
        return listed, index.view(ids.shape), rows

    def _refresh(self, ids: Tensor, rows: Tensor, changed: Tensor) -> None:
        """Reads the rows anew that an update changed after they were fetched."""
        at = torch.isin(ids, changed).nonzero().squeeze(-1)
        if len(at):
            fresh = torch.empty(len(at), self.width)
            self.table.gather(ids[at], fresh)
            rows[at] = fresh


class _PinnedPair:
    """Two pinned buffers by turns: one is filled while the other is still being copied to the GPU."""

    def __init__(self, width: int) -> None:
        self.rooms = [torch.empty(1, width, pin_memory=True) for _ in range(2)]
        self.events: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0

    def take(self, rows: int) -> Tensor:
        """Room for `rows` rows, once the copy from it has ended."""
        self.turn ^= 1
        event = self.events[self.turn]
        if event is not None:
            event.synchronize()
        room = self.rooms[self.turn]
        if len(room) < rows:
            room = self.rooms[self.turn] = torch.empty(rows * 5 // 4, room.shape[1], pin_memory=True)
        return room[:rows]

    def copied(self, rows: Tensor) -> None:
        """A copy from the room of `rows` was queued."""
        turn = next(t for t in range(2) if self.rooms[t].data_ptr() == rows.data_ptr())
        self.events[turn] = torch.cuda.Event()
        self.events[turn].record()  # type: ignore[union-attr]


class ReadRows(RowTable):
    """Rows of a table that is only read: nothing comes back to them, and learning is refused."""

    def __init__(self, table: Table, device: torch.device | str = "cpu") -> None:
        super().__init__(table.rows, table.width, optimizers.Frozen(), table.identity, table.layer)
        self.table, self._place = table, torch.device(device)
        self._anchor.requires_grad_(False)

    @property
    def place(self) -> torch.device:
        """The device that rows are given to the model on."""
        return self._place

    @property
    def steps(self) -> int:
        """None."""
        return 0

    def fetch(self, ids: Tensor) -> Fetched:
        """The rows `ids` [..., slots] int64."""
        listed, index = (torch.from_numpy(np.asarray(part)) for part in distinct(ids.cpu().contiguous()))
        return Fetched(listed, index.view(ids.shape).to(self.place), self.read(listed).requires_grad_())

    def prefetch(self, ids: Tensor) -> None:
        """Nothing: see `Table.prefetch`."""

    def learn(self, ids: Tensor, grads: Tensor, rate: float) -> None:
        """Raises `ValueError`."""
        raise ValueError("these rows are only read: name an `optimizer` when you open or attach them, and they learn")

    def read(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [...]."""
        out = torch.empty(*ids.shape, self.width)
        self.table.gather(ids.cpu().contiguous(), out)
        return out.to(self.place)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows, f32, as a table file."""
        write_fresh(self.table, self.optimizer, path)


def write_fresh(table: Table, optimizer: RowOptimizer, path: str | os.PathLike[str]) -> None:
    """Writes the rows of `table` as a table file that `optimizer` can train on: at step 0, with a state of zeros."""
    header = table_file.TrainedHeader(table.rows, table.width, optimizer, 0, table.identity, table.layer)

    def rows(first: int, last: int) -> table_file.Floats:
        out = np.empty((last - first, table.width), np.float32)
        table.gather(np.arange(first, last), out)
        return out

    def zeros(width: int) -> table_file.Read:
        return lambda first, last: np.zeros((last - first, width), np.float32)

    states = [zeros(width) for width in table_file.state_widths(optimizer, table.width)]
    table_file.write(path, header, [rows, *states])


class DeviceRows(RowTable):
    """Rows and their state on a device, as buffers: they are in `state_dict`, and move with `to`."""

    values: Tensor
    taken: Tensor

    def __init__(
        self,
        rows: int,
        width: int,
        optimizer: RowOptimizer,
        identity: str = NO_IDENTITY,
        layer: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(rows, width, optimizer, identity, layer)
        self.register_buffer("values", torch.zeros(rows, width, device=device))
        for number, kind in enumerate(table_file.state_widths(optimizer, width)):
            self.register_buffer(f"state{number}", torch.zeros(rows, kind, device=device))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @property
    def place(self) -> torch.device:
        """Where the rows are."""
        return self.values.device

    @property
    def state(self) -> list[Tensor]:
        """Each kind of optimiser state, [rows, ·]."""
        kinds = len(table_file.state_widths(self.optimizer, self.width))
        return [self.get_buffer(f"state{number}") for number in range(kinds)]

    @property
    def steps(self) -> int:
        """Updates made so far."""
        return int(self.taken)

    def fill(self, deviation: float, seed: int) -> None:
        """Gives the rows the values that a new table in our store begins with."""
        source = TrainableTable.create(self.width, self.rows, optimizer="frozen", deviation=deviation, seed=seed)
        for first in range(0, self.rows, 1 << 16):
            ids = torch.arange(first, min(first + (1 << 16), self.rows))
            self.values[first : first + len(ids)] = source.gather(ids, torch.empty(len(ids), self.width))

    def fetch(self, ids: Tensor) -> Fetched:
        """The rows `ids` [..., slots] int64."""
        self._check(ids)
        listed, index = self._distinct(ids)
        rows = self.values.index_select(0, listed)
        return Fetched(listed, index.view(ids.shape), rows.requires_grad_())

    def prefetch(self, ids: Tensor) -> None:
        """Nothing to do: the rows are here."""

    @torch.no_grad()
    def learn(self, ids: Tensor, grads: Tensor, rate: float) -> None:
        """One optimiser step; see `RowTable.learn`."""
        self._check(ids)
        # The extremes say whether all is finite in one pass, and need no tensor of that size.
        if grads.numel() and not torch.stack(grads.aminmax()).isfinite().all():
            raise ValueError("a gradient of a row is not finite; a row would keep it forever")
        listed, sums = self._summed(ids, grads)
        self.taken += 1
        steps, state = self.steps, self.state
        for first in range(0, len(listed), self._at_once(len(listed))):
            part = slice(first, first + self._at_once(len(listed)))
            places = listed[part]
            rows, kinds = self.values.index_select(0, places), [kind.index_select(0, places) for kind in state]
            row_optimizer.step(self.optimizer, steps, rate, rows, kinds, sums[part])
            self.values.index_copy_(0, places, rows)
            for kind, changed in zip(state, kinds, strict=True):
                kind.index_copy_(0, places, changed)

    def _summed(self, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ids, ascending, and the sum of the gradients of each, [distinct, width]."""
        grads = grads.to(self.place).view(-1, self.width).float()
        listed, index = self._distinct(ids)
        if len(listed) == ids.numel() and torch.equal(listed, ids.flatten().to(self.place)):
            return listed, grads
        sums = torch.zeros(len(listed), self.width, device=self.place)
        return listed, sums.index_add_(0, index.flatten(), grads)

    def _at_once(self, rows: int) -> int:
        """Rows that learn at once. On a CPU so few that what is computed of them stays in its cache: memory that is
        taken from the system and given back at every operation costs more than the operation."""
        together = self.place.type != "cpu" or isinstance(self.optimizer, BalancedMomentum)
        return max(rows if together else CACHED_VALUES // self.width, 1)

    def read(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [...]."""
        self._check(ids)
        return self.values.index_select(0, ids.to(self.place).flatten()).view(*ids.shape, self.width)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table file, streaming from the device."""
        header = table_file.TrainedHeader(self.rows, self.width, self.optimizer, self.steps, self.identity, self.layer)

        def reader(section: Tensor) -> table_file.Read:
            return lambda first, last: section[first:last].cpu().numpy()

        table_file.write(path, header, [reader(section) for section in (self.values, *self.state)])

    @torch.no_grad()
    def take_sections(self, steps: int, sections: Sequence[table_file.Floats]) -> None:
        """Takes rows and state from the sections of a table file."""
        self.taken.fill_(steps)
        for target, section in zip((self.values, *self.state), sections, strict=True):
            for first in range(0, self.rows, 1 << 16):
                part = np.array(section[first : first + (1 << 16)])
                target[first : first + len(part)] = torch.from_numpy(part)

    def _distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ids, ascending, and which of them each one is."""
        if self.place.type == "cpu":
            listed, index = (torch.from_numpy(np.asarray(part)) for part in distinct(ids.cpu().contiguous()))
            return listed, index
        listed, index = torch.unique(ids.to(self.place), return_inverse=True)
        return listed, index

    def _check(self, ids: Tensor) -> None:
        """On a CPU, refuses ids that are not rows; a GPU's own indexing asserts it."""
        if self.place.type == "cpu" and ids.numel():
            least, most = (int(bound) for bound in ids.aminmax())
            if least < 0 or most >= self.rows:
                wrong = most if most >= self.rows else least
                raise ValueError(f"row {wrong} is outside the table of {self.rows} rows")
