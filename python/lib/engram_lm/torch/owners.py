"""Rows among processes: every row has one owner.

Ids go to the owners, rows come back; gradients return to the owners, which add them in the order of the batch's parts
and update. Row i belongs to the virtual shard i mod 64, and a process holds some of the shards: interleaved, because
the ids of frequent n-grams lie close together, and 64 whatever the number of processes, so that a run resumes on
another.
No gradient is ever the size of a table.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_lm import table_file
from engram_lm._core import Addressing, distinct
from engram_lm.optimizers import RowOptimizer
from engram_lm.table_file import Floats, TrainedHeader
from engram_lm.torch.group import Group
from engram_lm.torch.rows import Fetched, RowTable, Where

SHARDS = 64


class Shares:
    """Which process owns which row of a table of `rows` rows, and where it has it."""

    def __init__(self, rows: int, size: int) -> None:
        if not 0 < size <= SHARDS:
            raise ValueError(f"{size} processes share rows; there are {SHARDS} shards, and each takes at least one")
        self.rows, self.size = rows, size
        in_shard = (rows - np.arange(SHARDS) + SHARDS - 1) // SHARDS
        # Where a shard's rows begin in its owner's table; shards of one owner lie one after another.
        self.begin = np.zeros(SHARDS, np.int64)
        self.counts = [0] * size
        for shard in range(SHARDS):
            owner = shard % size
            self.begin[shard] = self.counts[owner]
            self.counts[owner] += int(in_shard[shard])

    def owner(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rank that owns each row."""
        return ids % SHARDS % self.size

    def place(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where its owner has each row."""
        place: NDArray[np.int64] = self.begin[ids % SHARDS] + ids // SHARDS
        return place

    def check_arrived(self, ids: NDArray[np.int64], rank: int, sender: int) -> None:
        """Raises `RuntimeError` if an id that arrived is not a row of this owner: something changed it on its way."""
        wrong = (ids < 0) | (ids >= self.rows) | (self.owner(ids) != rank)
        if wrong.any():
            raise RuntimeError(
                f"rank {rank} received row {ids[wrong][0]} from rank {sender}, which is not one of its rows: the "
                "exchange between processes changes data; check network and transport before training on"
            )


class OwnedTable:
    """A table of `rows` rows whose rows are shared among the processes of a group.

    With one process it is a plain table.
    """

    def __init__(self, table: RowTable, rows: int, group: Group) -> None:
        self.table, self.rows, self.group = table, rows, group
        self.shares = Shares(rows, group.size)
        self._asked: list[list[Tensor]] = []

    @staticmethod
    def create(
        group: Group,
        width: int,
        addressing: Addressing,
        optimizer: RowOptimizer,
        where: Where,
        deviation: float,
        seed: int,
        folder: Path | None,
    ) -> "OwnedTable":
        """A new table, whose rows begin as one process would draw them."""
        options: dict[str, Any] = {"where": where, "device": group.device, "optimizer": optimizer}
        rows = addressing.rows
        if group.size == 1:
            table = RowTable.create(
                width,
                addressing=addressing,
                deviation=deviation,
                seed=seed,
                folder=folder,
                **options,
            )
            return OwnedTable(table, rows, group)
        shares = Shares(rows, group.size)
        table = RowTable.create(width, shares.counts[group.rank], folder=folder, **options)
        table.identity, table.layer = addressing.identity, addressing.layer_id
        owned = OwnedTable(table, rows, group)
        if deviation:
            owned._load(owned._drawn(deviation, seed), folder, where)
        return owned

    @staticmethod
    def open(path: Path, group: Group, addressing: Addressing, where: Where, folder: Path | None) -> "OwnedTable":
        """The table of a checkpoint, of which every process takes its share, whatever their number was before."""
        if group.size == 1:
            table = RowTable.open(
                path,
                where=where,
                device=group.device,
                addressing=addressing,
                folder=folder,
            )
            return OwnedTable(table, addressing.rows, group)
        # Rank 0 checks every block, and all that the file belongs to this addressing.
        header, sections = table_file.open_sections(path, check=group.rank == 0)
        if (header.identity, header.layer) != (addressing.identity, addressing.layer_id):
            raise ValueError(f"{path}: holds rows of layer {header.layer} of the addressing {header.identity}")
        shares = Shares(header.rows, group.size)
        table = RowTable.create(
            header.width,
            shares.counts[group.rank],
            where=where,
            device=group.device,
            optimizer=header.optimizer,
        )
        table.identity, table.layer = header.identity, header.layer
        owned = OwnedTable(table, header.rows, group)
        owned._load((header.step, sections), folder, where)
        return owned

    # --- rows of a step ---------------------------------------------------------------------------------------------

    def fetch(self, parts: Sequence[Tensor]) -> list[Fetched]:
        """The rows of this process's parts of the batch, ids [.., slots] each; all processes call it together."""
        if self.group.size == 1:
            return [self.table.fetch(ids) for ids in parts]
        listed = [tuple(torch.from_numpy(np.asarray(a)) for a in distinct(ids.contiguous())) for ids in parts]
        all_ids = torch.cat([ids for ids, _ in listed]) if listed else torch.empty(0, dtype=torch.int64)
        owners = torch.from_numpy(self.shares.owner(all_ids.numpy()))
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=self.group.size).tolist()
        arrived = self.group.exchange(list(all_ids[order].split(counts)))
        for sender, ids in enumerate(arrived):
            self.shares.check_arrived(ids.numpy(), self.group.rank, sender)
        places = torch.from_numpy(self.shares.place(torch.cat(arrived).numpy()))
        rows = self.table.read(places).cpu()
        self._asked = [list(order.split(counts)), [ids for ids, _ in listed], arrived]
        returned = torch.cat(self.group.exchange(list(rows.split([len(ids) for ids in arrived]))))
        gathered = torch.empty(len(all_ids), self.table.width)
        gathered[order] = returned
        fetched = []
        for (ids, index), part, rows_of_part in zip(
            listed, parts, gathered.split([len(ids) for ids, _ in listed]), strict=True
        ):
            rows_here = rows_of_part.to(self.group.device).requires_grad_()
            fetched.append(Fetched(ids, index.view(part.shape).to(self.group.device), rows_here))
        return fetched

    def update(self, fetched: Sequence[Fetched], rate: float) -> None:
        """One optimiser step on the rows of what `fetch` gave last, by the gradients that `backward` has left there."""
        if self.group.size == 1:
            ids = torch.cat([part.ids.cpu() for part in fetched])
            grads = torch.cat([part.grads for part in fetched])
            self.table.learn(ids.to(grads.device), grads, rate)
            return
        orders, _, arrived = self._asked
        grads = torch.cat([part.grads.cpu() for part in fetched])
        mine = torch.cat(self.group.exchange([grads[order] for order in orders]))
        places = torch.from_numpy(self.shares.place(torch.cat(arrived).numpy()))
        # By rank, and a rank's by part: the order of the batch's parts, however many processes there are.
        self.table.learn(places, mine, rate)

    def read(self, ids: Tensor) -> Tensor:
        """Rows [..., width] for ids [..., ] outside of training; all processes call it together."""
        (fetched,) = self.fetch([ids])
        with torch.no_grad():
            return fetched.embed()

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes the whole table; all processes call it together, with a folder that all of them see."""
        if self.group.size == 1:
            self.table.save(path)
            return
        share = path.with_name(f".share{self.group.rank}-{path.name}")
        self.table.save(share)
        self.group.barrier()
        if self.group.rank == 0:
            shares = [path.with_name(f".share{rank}-{path.name}") for rank in range(self.group.size)]
            opened = [table_file.open_sections(one, check=False) for one in shares]
            self._merge(path, [sections for _, sections in opened])
            for one in shares:
                one.unlink()
        self.group.barrier()

    def _merge(self, path: Path, shares: list[list[Floats]]) -> None:
        header = TrainedHeader(
            self.rows, self.table.width, self.table.optimizer, self.table.steps, self.table.identity, self.table.layer
        )

        def reader(kind: int, width: int) -> table_file.Read:
            def read(first: int, last: int) -> Floats:
                ids = np.arange(first, last)
                owners, places = self.shares.owner(ids), self.shares.place(ids)
                values = np.empty((len(ids), width), np.float32)
                for rank, sections in enumerate(shares):
                    values[owners == rank] = sections[kind][places[owners == rank]]
                return values

            return read

        table_file.write(path, header, [reader(kind, width) for kind, width in enumerate(header.widths)])

    def _load(self, source: tuple[int, Sequence[Floats]], folder: Path | None, where: Where) -> None:
        """Takes this process's rows of a whole table's sections, by way of a file of its share."""
        step, sections = source
        ids = np.empty(self.shares.counts[self.group.rank], np.int64)
        mine = np.arange(self.rows)[self.shares.owner(np.arange(self.rows)) == self.group.rank]
        ids[self.shares.place(mine)] = mine
        header = TrainedHeader(
            len(ids), self.table.width, self.table.optimizer, step, self.table.identity, self.table.layer
        )

        def reader(section: Floats) -> table_file.Read:
            return lambda first, last: section[ids[first:last]]

        scratch = (folder or Path(os.environ.get("TMPDIR", "/tmp"))) / f".share{self.group.rank}-{os.getpid()}.table"
        try:
            table_file.write(scratch, header, [reader(section) for section in sections])
            self.table = RowTable.open(scratch, where=where, device=self.group.device, folder=None)
        finally:
            scratch.unlink(missing_ok=True)

    def _drawn(self, deviation: float, seed: int) -> tuple[int, list[Floats]]:
        """A new table's sections: the rows that are drawn, and no state yet."""
        drawn = RowTable.create(self.table.width, self.rows, optimizer="frozen", deviation=deviation, seed=seed)
        rows = drawn.read(torch.arange(self.rows)).numpy()
        widths = table_file.state_widths(self.table.optimizer, self.table.width)
        return 0, [rows, *(np.broadcast_to(np.float32(0), (self.rows, width)) for width in widths)]
