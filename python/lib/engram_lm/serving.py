"""Rows for serving engines: what EngramStore, vLLM and SGLang ask of a backend for memory tables.

* `EngramStore` has Mooncake's signature: head-local ids in, stored rows out, in place.
* `HostGather` fetches a step's rows into one host buffer before the step's graph runs, as the engines' host-gather
  paths do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_lm._core import Addressing, Table, Ticket

Ids = NDArray[np.int64]


class EngramStore:
    """Tables by layer, asked for by head-local ids: `lookup_into(layer, ids [B, L, H], out [B, L, H, row_bytes])`.

    Rows are opaque bytes, as they are stored. Ids are checked; no lock of the interpreter is held while rows are read.
    """

    def __init__(self, tables: Mapping[int, Table], heads: Mapping[int, Sequence[int]]) -> None:
        """`heads`: of every layer, the rows of each of its H heads (`Addressing.primes`, flattened).

        Raises `ValueError` if the heads' rows are not the table's.
        """
        self.tables = dict(tables)
        self._sizes, self._first = {}, {}
        for layer, table in self.tables.items():
            sizes = np.array(heads[layer], np.int64)
            if sizes.sum() != table.rows:
                raise ValueError(f"layer {layer}: its heads have {sizes.sum()} rows, its table {table.rows}")
            self._sizes[layer] = sizes
            self._first[layer] = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)

    @staticmethod
    def of(addressing: Addressing, tables: Mapping[int, Table]) -> "EngramStore":
        """The tables of an addressing's layers."""
        heads = {layer: np.ravel(addressing.layer(layer).primes).tolist() for layer in tables}
        return EngramStore(tables, heads)

    def row_bytes(self, layer: int) -> int:
        """Bytes of a stored row of `layer`."""
        return self.tables[layer].row_bytes

    def lookup_into(self, layer: int, ids: Ids, out: Any) -> None:
        """Head-local `ids` int64 [B, L, H] to stored rows, into `out` uint8 [B, L, H, row_bytes], in place.

        Raises `KeyError` for a layer without a table; `TypeError`, `ValueError` for wrong arrays, or an id that its
        head does not have, named with its place.
        """
        self.tables[layer].lookup_into(self._global(layer, ids), out)

    def prefetch(self, layer: int, ids: Ids) -> Ticket:
        """Begins to fetch, and returns at once; `Ticket.take_stored(out)` has the rows. Raises as `lookup_into`."""
        return self.tables[layer].prefetch(self._global(layer, ids))

    def _global(self, layer: int, ids: Ids) -> Ids:
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64:
            raise TypeError(f"`ids` is {getattr(ids, 'dtype', type(ids).__name__)}, but must be an int64 array")
        sizes = self._sizes[layer]
        if ids.ndim != 3 or ids.shape[-1] != len(sizes):
            raise ValueError(f"`ids` has the shape {list(ids.shape)}, but must have [B, L, {len(sizes)}]")
        wrong = (ids < 0) | (ids >= sizes)
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(f"`ids{list(place)}` is {ids[place]}, but head {place[-1]} has {sizes[place[-1]]} rows")
        found: Ids = ids + self._first[layer]
        return found


class HostGather:
    """Rows of a step for all memory layers, fetched into one buffer before the step runs.

    `submit` after the scheduler has chosen a step's tokens; `wait` before the step's graph is launched. Two buffers are
    used by turns, so that a step's rows stay while the next ones are fetched. Give pinned memory (`buffers`) where they
    are copied to a GPU.
    """

    def __init__(self, addressing: Addressing, tables: Mapping[int, Table], tokens: int, buffers: Any = None) -> None:
        """`tokens`: of a step, at most. `buffers`: two of each layer, uint8 [tokens, slots, row_bytes]."""
        self.addressing, self.tables, self.tokens = addressing, dict(tables), tokens
        self._buffers = buffers or {
            layer: tuple(np.empty((tokens, addressing.layer(layer).slots, table.row_bytes), np.uint8) for _ in range(2))
            for layer, table in self.tables.items()
        }
        self._turn = 0
        self._waiting: dict[int, tuple[Ticket, int]] = {}

    def submit(self, ids: Mapping[int, Any]) -> None:
        """Begins to fetch: of every layer the row ids of the step, int64 [tokens, slots] (`History.extend` gives them).

        Raises `ValueError` if there are more tokens than were announced; `RuntimeError` if a step is still waiting.
        """
        if self._waiting:
            raise RuntimeError("the rows of the step before were not waited for: call `wait` first")
        for layer in self.tables:
            count = len(ids[layer])
            if count > self.tokens:
                raise ValueError(f"a step of {count} tokens; {self.tokens} were announced")
        self._waiting = {layer: (table.prefetch(ids[layer]), len(ids[layer])) for layer, table in self.tables.items()}

    def wait(self) -> dict[int, Any]:
        """The rows of the step, as they are stored: uint8 [tokens, slots, row_bytes] by layer, valid for two steps."""
        rows = {}
        self._turn ^= 1
        for layer, (ticket, count) in self._waiting.items():
            out = self._buffers[layer][self._turn][:count]
            ticket.take_stored(out)
            rows[layer] = out
        self._waiting = {}
        return rows
