"""Rows that learn: every optimiser against its formula, and what an update must not touch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_lm import Addressing, FormatError, Table, TrainableTable, optimizers

ROWS, WIDTH, STEPS, RATE = 40, 6, 5, 1e-2


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids with repetitions, and a gradient for each occurrence."""
    random = np.random.default_rng(7)
    shapes = [(3, 4)] * STEPS
    return [
        (random.integers(0, ROWS, shape), random.normal(size=(*shape, WIDTH)).astype(np.float32)) for shape in shapes
    ]


def summed(ids: np.ndarray, grads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, inverse = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(distinct), WIDTH))
    np.add.at(sums, inverse.ravel(), grads.reshape(-1, WIDTH).astype(np.float64))
    return distinct, sums


def adam(rows: np.ndarray) -> np.ndarray:
    m, v = np.zeros_like(rows), np.zeros_like(rows)
    for step, (ids, grads) in enumerate(batches(), 1):
        at, g = summed(ids, grads)
        m[at] += 0.1 * (g - m[at])
        v[at] += 0.001 * (g**2 - v[at])
        rows[at] -= RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m[at] / (np.sqrt(v[at]) + 1e-8)
    return rows


def adam_by_row(rows: np.ndarray) -> np.ndarray:
    m, v, t = np.zeros_like(rows), np.zeros_like(rows), np.zeros((len(rows), 1))
    for ids, grads in batches():
        at, g = summed(ids, grads)
        t[at] += 1
        m[at] += 0.1 * (g - m[at])
        v[at] += 0.001 * (g**2 - v[at])
        corrected = m[at] / (1 - 0.9 ** t[at])
        rows[at] -= RATE * corrected / (np.sqrt(v[at] / (1 - 0.999 ** t[at])) + 1e-8)
    return rows


def row_wise(rows: np.ndarray) -> np.ndarray:
    v = np.zeros(len(rows))
    for ids, grads in batches():
        at, g = summed(ids, grads)
        s = (g**2).mean(-1)
        v[at] = np.where(v[at] == 0, s, v[at] + 0.001 * (s - v[at]))
        rows[at] -= RATE * g / (np.sqrt(v[at])[:, None] + 1e-8)
    return rows


def balanced(rows: np.ndarray) -> np.ndarray:
    m = np.zeros_like(rows)
    for ids, grads in batches():
        at, g = summed(ids, grads)
        m[at] = 0.95 * m[at] + g
        u = g + 0.95 * m[at]
        for turn in range(11):
            u /= np.sqrt((u**2).mean(1 if turn % 2 == 0 else 0, keepdims=True))
        rows[at] -= RATE * 0.18 * u
    return rows


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "adam": adam,
    "adam-by-row": adam_by_row,
    "row-wise-adam": row_wise,
    "balanced-momentum": balanced,
    "frozen": lambda rows: rows,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("mapped", [False, True])
def test_optimisers_follow_their_formulas(name: str, mapped: bool, tmp_path: Path) -> None:
    chosen = optimizers.named(name)
    folder = tmp_path if mapped else None
    table = TrainableTable.create(WIDTH, ROWS, optimizer=chosen, deviation=0.5, seed=1, folder=folder)
    assert table.optimizer == chosen
    before = np.asarray(table.gather(np.arange(ROWS))).copy()
    for ids, grads in batches():
        table.update(ids, grads, RATE)
    assert table.step == STEPS
    found = np.asarray(table.gather(np.arange(ROWS)))
    assert np.allclose(found, FORMULAS[name](before.astype(np.float64)), atol=2e-6, rtol=1e-5)
    untouched = sorted(set(range(ROWS)) - {int(i) for ids, _ in batches() for i in ids.flat})
    assert untouched and np.array_equal(found[untouched], before[untouched])


def test_sparse_adam_of_pytorch_takes_the_same_steps() -> None:
    torch = pytest.importorskip("torch")
    table = TrainableTable.create(WIDTH, ROWS, optimizer="adam", deviation=0.5)
    embedding = torch.nn.Embedding(ROWS, WIDTH, sparse=True)
    with torch.no_grad():
        table.gather(torch.arange(ROWS), embedding.weight.detach())
    optimiser = torch.optim.SparseAdam(embedding.parameters(), lr=RATE)
    for ids, grads in batches():
        optimiser.zero_grad()
        (embedding(torch.from_numpy(ids)) * torch.from_numpy(grads)).sum().backward()
        optimiser.step()
        table.update(torch.from_numpy(ids), torch.from_numpy(grads), RATE)
    assert np.allclose(table.gather(np.arange(ROWS)), embedding.weight.detach().numpy(), atol=1e-6)


def test_saved_and_opened_it_goes_on_bit_for_bit(tmp_path: Path, addressing: Addressing) -> None:
    layer = addressing.layer(14)
    table = TrainableTable.create(WIDTH, addressing=layer, optimizer="adam", deviation=0.1)
    for ids, grads in batches()[:3]:
        table.update(ids, grads, RATE)
    table.save(tmp_path / "a.table")
    resumed = TrainableTable.open(tmp_path / "a.table", addressing=layer)
    assert (resumed.step, resumed.rows, resumed.layer, resumed.identity) == (
        3,
        layer.rows,
        14,
        layer.identity,
    )
    for one in (table, resumed):
        for ids, grads in batches()[3:]:
            one.update(ids, grads, RATE)
    every = np.arange(table.rows)
    assert np.array_equal(table.gather(every), resumed.gather(every))
    table.save(tmp_path / "b.table")
    assert np.array_equal(Table.open(tmp_path / "b.table").gather(every), table.gather(every))


def test_what_is_refused_leaves_the_table_as_it_was(tmp_path: Path, table_file: Path) -> None:
    table = TrainableTable.create(WIDTH, ROWS, optimizer="adam", deviation=0.1)
    before = bytes(table.gather(np.arange(ROWS)))
    grads = np.ones((2, WIDTH), np.float32)
    refused: list[tuple[Any, type[Exception], str]] = [
        (([1, ROWS], grads, RATE), ValueError, "row 40"),
        (([1, 2], grads[:1], RATE), ValueError, r"`grads` has the shape \[1, 6\], but must have \[2, 6\]"),
        (([1, 2], grads.astype(np.float64), RATE), TypeError, "`grads` holds float64"),
        (([1, 2], grads * np.nan, RATE), ValueError, "the gradient of row 1, at position 0"),
        (([1, 2], grads, float("inf")), ValueError, "rate"),
        (([1, 2], grads, -1.0), ValueError, "rate"),
    ]
    for arguments, kind, message in refused:
        with pytest.raises(kind, match=message):
            table.update(*arguments)
    assert (table.step, bytes(table.gather(np.arange(ROWS)))) == (0, before)
    with pytest.raises(ValueError, match="no row optimiser 'sgd'"):
        TrainableTable.create(WIDTH, ROWS, optimizer="sgd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta1"):
        TrainableTable.create(WIDTH, ROWS, optimizer=optimizers.Adam(beta1=1.5))
    with pytest.raises(ValueError, match="give `rows`"):
        TrainableTable.create(WIDTH, optimizer="adam")
    with pytest.raises(FormatError, match="without optimiser state"):
        import engram_lm

        engram_lm.convert(table_file, tmp_path / "plain.table", "f32")
        TrainableTable.open(tmp_path / "plain.table")
