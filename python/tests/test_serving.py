"""Row backends against stand-ins of what serving engines call."""

from pathlib import Path

import numpy as np
import pytest

from engram_lm import Addressing, Table, TrainableTable, convert
from engram_lm.serving import EngramStore, HostGather


@pytest.fixture
def tables(tmp_path: Path, addressing: Addressing) -> dict[int, Table]:
    """Both layers' tables in V4.1's format: 32 values and their scale, 33 bytes."""
    made = {}
    for layer in addressing.layers:
        path = tmp_path / f"{layer}.table"
        table = TrainableTable.create(
            32, addressing=addressing.layer(layer), optimizer="frozen", deviation=1.0, seed=layer
        )
        table.save(path)
        convert(path, path.with_suffix(".fp8"), "fp8e4m3")
        made[layer] = Table.open(path.with_suffix(".fp8"), addressing=addressing.layer(layer))
    return made


class StandInStore:
    """Mooncake's EngramStore in a few lines of numpy: a table for each head, ids local to it, rows as bytes."""

    def __init__(self, heads: dict[int, list[np.ndarray]]) -> None:
        self.heads = heads

    def lookup_into(self, layer: int, ids: np.ndarray, out: np.ndarray) -> None:
        for head, rows in enumerate(self.heads[layer]):
            out[:, :, head] = rows[ids[:, :, head]]


def test_lookups_of_mooncakes_signature(addressing: Addressing, tables: dict[int, Table]) -> None:
    store = EngramStore.of(addressing, tables)
    stand_in = {}
    for layer, table in tables.items():
        stored = np.empty((table.rows, table.row_bytes), np.uint8)
        table.lookup_into(np.arange(table.rows), stored)
        sizes = np.ravel(addressing.layer(layer).primes)
        stand_in[layer] = np.split(stored, np.cumsum(sizes)[:-1])
    expected_store = StandInStore(stand_in)
    random = np.random.default_rng(0)
    for layer in tables:
        sizes = np.ravel(addressing.layer(layer).primes)
        ids = random.integers(0, sizes, (3, 7, len(sizes)))
        out = np.zeros((3, 7, len(sizes), store.row_bytes(layer)), np.uint8)
        expected, pointer = out.copy(), out.ctypes.data
        store.lookup_into(layer, ids, out)
        expected_store.lookup_into(layer, ids, expected)
        assert np.array_equal(out, expected) and out.ctypes.data == pointer
        out[:] = 0
        store.prefetch(layer, ids).take_stored(out)
        assert np.array_equal(out, expected)


def test_wrong_lookups(addressing: Addressing, tables: dict[int, Table]) -> None:
    store = EngramStore.of(addressing, tables)
    heads = np.ravel(addressing.layer(1).primes)
    out = np.zeros((1, 1, 4, store.row_bytes(1)), np.uint8)
    ids = np.zeros((1, 1, 4), np.int64)
    for wrong in (-1, int(heads[2])):
        ids[0, 0, 2] = wrong
        with pytest.raises(ValueError, match=rf"`ids\[0, 0, 2\]` is {wrong}, but head 2 has {heads[2]} rows"):
            store.lookup_into(1, ids, out)
    with pytest.raises(TypeError, match="int32"):
        store.lookup_into(1, np.zeros((1, 1, 4), np.int32), out)
    with pytest.raises(ValueError, match=r"\[B, L, 4\]"):
        store.lookup_into(1, np.zeros((1, 4), np.int64), out)
    with pytest.raises(KeyError):
        store.lookup_into(2, np.zeros((1, 1, 4), np.int64), out)
    with pytest.raises(ValueError, match="its heads have 12 rows"):
        EngramStore({1: tables[1]}, {1: [5, 7]})


def test_a_step_is_gathered_before_its_graph_runs(addressing: Addressing, tables: dict[int, Table]) -> None:
    """The loop of an engine: tokens are scheduled, rows submitted and waited for, a graph replayed."""
    gather = HostGather(addressing, tables, tokens=8)
    history, whole = addressing.history(), [7, 3, 9, 9, 4, 1, 30, 12, 44]
    expected = {layer: np.asarray(addressing.layer(layer).row_ids(whole)) for layer in tables}
    at, held = 0, None
    for step in ([7, 3, 9], [9], [4, 1, 30, 12], [44]):
        ids = dict(zip(tables, history.extend_layers(step), strict=True))
        gather.submit(ids)
        with pytest.raises(RuntimeError, match="`wait` first"):
            gather.submit(ids)
        rows = gather.wait()
        for layer, table in tables.items():
            wanted = np.empty((len(step), 4, table.row_bytes), np.uint8)
            table.lookup_into(expected[layer][at : at + len(step)], wanted)
            assert np.array_equal(rows[layer], wanted)
        if held is not None:
            assert np.array_equal(held[0], held[1]), "the step before still has its rows"
        held = (rows[1], rows[1].copy())
        at += len(step)
    with pytest.raises(ValueError, match="a step of 9 tokens; 8 were announced"):
        gather.submit({layer: np.zeros((9, 4), np.int64) for layer in tables})
