"""Tables: every tier has the rows that were written, and a file that is not right is refused."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engram_lm
from engram_lm import Addressing, AddressMismatch, DamagedError, FormatError, Table, TrainableTable

TIERS: list[dict[str, Any]] = [
    {"tier": "mapped"},
    {"tier": "mapped", "checked": True},
    {"tier": "ram"},
    {"tier": "direct"},
    {"tier": "direct", "cache": "64KiB"},
    {"tier": "mapped", "cache": 65_536},
]


def all_rows(table: Table | TrainableTable) -> np.ndarray:
    return np.asarray(table.gather(np.arange(table.rows)))


@pytest.mark.parametrize("options", TIERS, ids=str)
def test_every_tier_has_the_same_rows(table_file: Path, addressing: Addressing, options: dict[str, Any]) -> None:
    written = all_rows(TrainableTable.open(table_file))
    table = Table.open(table_file, addressing=addressing.layer(1), **options)
    assert (table.rows, table.width, table.format, table.row_bytes) == (
        addressing.layer(1).rows,
        8,
        "f32",
        32,
    )
    ids = np.random.default_rng(0).integers(0, table.rows, (7, 11))
    for _ in range(2):
        assert np.array_equal(table.gather(ids), written[ids])
        stored = np.empty((7, 11, 32), np.uint8)
        table.lookup_into(ids, stored)
        assert np.array_equal(stored.view(np.float32), written[ids])
        ticket = table.prefetch(ids)
        assert np.array_equal(ticket.take(), written[ids])
    stats = table.stats()
    assert stats["bytes"] == table.rows * 32
    if "cache" in options:
        assert stats["cache_hits"] > 0


@pytest.mark.parametrize("name", ["f32", "bf16", "f16", "fp8e4m3", "fp8e4m3:auto", "int8", "int4"])
def test_conversion_and_its_report(table_file: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "converted.table"
    report = engram_lm.convert(table_file, target, name)
    engram_lm.verify(target)
    exact, found = all_rows(Table.open(table_file)), all_rows(Table.open(target))
    assert np.abs(found - exact).max() == pytest.approx(report["largest_error"], rel=1e-6)
    assert report["relative_rms_error"] < {"int4": 0.15, "int8": 0.01}.get(name, 0.04)
    assert engram_lm.table_info(target)["rows"] == report["rows"]


def test_progress_is_told_and_its_exceptions_end_the_work(table_file: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    engram_lm.verify(table_file, lambda done, total: told.append((done, total)))
    assert told and told[-1][0] == told[-1][1]

    def stop(done: int, total: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        engram_lm.convert(table_file, tmp_path / "half.table", "bf16", stop)
    assert not (tmp_path / "half.table").exists()


def test_files_that_are_not_right(table_file: Path, tmp_path: Path, addressing: Addressing) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Table.open(tmp_path / "absent.table")
    (tmp_path / "text").write_text("no table" * 1000)
    with pytest.raises(FormatError, match="text"):
        Table.open(tmp_path / "text")
    with pytest.raises(AddressMismatch, match="layer 14"):
        Table.open(table_file, addressing=addressing.layer(14))
    config = json.loads(addressing.to_json())
    config["layers"][0]["multipliers"][0] = "3"
    other = Addressing.from_json(json.dumps(config), list(range(50)))
    with pytest.raises(AddressMismatch, match=other.identity):
        Table.open(table_file, addressing=other.layer(1))
    whole = table_file.read_bytes()
    table_file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(DamagedError, match="byte 4096"):
        engram_lm.verify(table_file)
    with pytest.raises(DamagedError):
        Table.open(table_file, tier="ram")
    with pytest.raises(DamagedError):
        Table.open(table_file, checked=True).gather([30])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "disk"}, '`tier` is "disk"'),
        ({"cache": "many"}, '"many" is not a number of bytes'),
        ({"cache": "1 XB"}, "is not a number of bytes"),
        ({"time_limit": 0.0}, "`time_limit` is 0"),
        ({"time_limit": float("nan")}, "`time_limit` is NaN"),
        ({"tier": "direct", "depth": 0}, "depth"),
    ],
)
def test_impossible_settings(table_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table.open(table_file, **options)


def test_overlays_stack_and_know_their_base(table_file: Path, tmp_path: Path) -> None:
    table = Table.open(table_file)
    before = all_rows(table)
    first = table.overlay_writer()
    first.set([5, 3], np.array([[1] * 8, [2] * 8], np.float32))
    assert len(first) == 2
    first.save(tmp_path / "first.overlay")
    with_first = Table.open(table_file, overlays=[tmp_path / "first.overlay"])
    second = with_first.overlay_writer()
    second.set_stored([3], np.full((1, 8), 4, np.float32).view(np.uint8))
    content = second.save(tmp_path / "second.overlay")
    both = Table.open(table_file, tier="ram", overlays=[tmp_path / "first.overlay", tmp_path / "second.overlay"])
    assert (both.content, both.stats()["overlays"]) == (content, 2)
    rows = all_rows(both)
    assert (rows[5] == 1).all() and (rows[3] == 4).all()
    unchanged = [i for i in range(table.rows) if i not in (3, 5)]
    assert np.array_equal(rows[unchanged], before[unchanged])
    assert np.array_equal(both.prefetch([3, 5]).take(), rows[[3, 5]])
    with pytest.raises(AddressMismatch, match="made for"):
        Table.open(table_file, overlays=[tmp_path / "second.overlay"])
    with pytest.raises(ValueError, match="row 10000"):
        first.set([10_000], np.zeros((1, 8), np.float32))


def test_tickets_are_taken_once(table_file: Path) -> None:
    table = Table.open(table_file)
    ticket = table.prefetch([1, 2, 3])
    with pytest.raises(ValueError, match=r"\[3, 9\]"):
        ticket.take(np.empty((3, 9), np.float32))
    assert np.array_equal(ticket.take(dtype="bf16"), table.gather([1, 2, 3], dtype="bf16"))
    with pytest.raises(RuntimeError, match="taken before"):
        ticket.take()
    stored = np.empty((3, 32), np.uint8)
    table.prefetch([1, 2, 3]).take_stored(stored)
    assert np.array_equal(stored.view(np.float32), table.gather([1, 2, 3]))
    with pytest.raises(ValueError, match="row 10000"):
        table.prefetch([10_000])


def test_tickets_can_be_awaited(table_file: Path) -> None:
    table = Table.open(table_file, tier="direct")

    async def fetch(ids: np.ndarray) -> np.ndarray:
        return np.asarray(await table.prefetch(ids))

    async def many() -> list[np.ndarray]:
        return await asyncio.gather(*(fetch(np.arange(n, n + 9)) for n in range(40)))

    for n, rows in enumerate(asyncio.run(many())):
        assert np.array_equal(rows, table.gather(np.arange(n, n + 9)))


def test_a_prefetch_is_bounded(table_file: Path) -> None:
    table = Table.open(table_file, prefetch_bytes=4096, time_limit=0.2)
    with pytest.raises(ValueError, match="bytes of rows to fetch"):
        table.prefetch(np.zeros(1000, np.int64))
    held = [table.prefetch(np.zeros(50, np.int64)) for _ in range(2)]
    with pytest.raises(TimeoutError):
        table.prefetch(np.zeros(50, np.int64))
    del held
    table.prefetch(np.zeros(50, np.int64)).take()


def test_distinct_rows() -> None:
    ids = np.random.default_rng(0).integers(0, 30, (5, 8))
    distinct, index = map(np.asarray, engram_lm.distinct(ids))
    expected, inverse = np.unique(ids, return_inverse=True)
    assert np.array_equal(distinct, expected) and np.array_equal(index, inverse.reshape(ids.shape))


def test_reuse_distances() -> None:
    reuse = engram_lm.ReuseStats()
    for _ in range(2):
        reuse.look_up(np.arange(10))
    assert reuse.lookups == 20
    assert (reuse.hit_rate(9), reuse.hit_rate(10)) == (0.0, 0.5)
    with pytest.raises(ValueError, match="`share`"):
        engram_lm.ReuseStats(0.0)
