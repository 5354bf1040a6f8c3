"""Tables of rows in PyTorch: on the device and in our store they learn alike, compiled or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from engram_lm import Addressing, AddressMismatch, TrainableTable
from engram_lm.torch import DeviceRows, RowTable, StoreRows

WIDTH, ROWS = 6, 50
OPTIMISERS = ["adam", "adam-by-row", "row-wise-adam", "balanced-momentum", "frozen"]


def both(optimizer: str, **options: Any) -> tuple[RowTable, RowTable]:
    made = [
        RowTable.create(WIDTH, ROWS, where=where, optimizer=optimizer, deviation=0.3, seed=5, **options)
        for where in ("store", "device")
    ]
    assert isinstance(made[0], StoreRows) and isinstance(made[1], DeviceRows)
    return made[0], made[1]


def everything(table: RowTable) -> torch.Tensor:
    return table.read(torch.arange(table.rows))


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_store_and_device_begin_and_learn_alike(optimizer: str) -> None:
    torch.manual_seed(0)
    tables = both(optimizer)
    assert torch.equal(everything(tables[0]), everything(tables[1]))
    for _ in range(6):
        ids, upstream = torch.randint(0, ROWS, (2, 3, 4)), torch.randn(2, 3, 4 * WIDTH)
        for table in tables:
            fetched = table.fetch(ids)
            (fetched.embed() * upstream).sum().backward()
            table.update(fetched, 1e-2)
    assert tables[0].steps == tables[1].steps == 6
    assert torch.allclose(everything(tables[0]), everything(tables[1]), atol=2e-6)


def test_a_first_step_scale_is_that_of_the_store() -> None:
    for optimizer in OPTIMISERS[:4]:
        tables = both(optimizer)
        before = everything(tables[0])
        for table in tables:
            table.learn(torch.tensor([3, 7]), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)), 0.1)
        moved = [(everything(table) - before)[[3, 7]] for table in tables]
        assert torch.allclose(moved[0], moved[1], atol=1e-6) and (moved[0].abs() > 1e-4).any()


@pytest.mark.parametrize("where", ["store", "device"])
@pytest.mark.parametrize("compiled", [False, True])
def test_as_a_layer_under_compile_and_autocast(where: Any, compiled: bool) -> None:
    torch.manual_seed(0)
    table = RowTable.create(WIDTH, ROWS, where=where, optimizer="adam", deviation=0.3)
    linear = torch.nn.Linear(WIDTH, 3)

    def model(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = linear(table(ids)).square().mean()
        return loss

    run: Callable[[torch.Tensor], torch.Tensor] = (
        torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    )
    ids = torch.randint(0, ROWS, (4, 5))
    for _ in range(2):
        expected_rows = table.read(ids).double().requires_grad_()
        weight, bias = linear.weight.double(), linear.bias.double()
        loss = (expected_rows @ weight.T + bias).square().mean()
        loss.backward()
        found = run(ids)
        assert abs(found.item() - loss.item()) < 1e-6
        found.backward()
        ((returned, grads),) = table._returned
        assert torch.equal(returned, ids.flatten())
        assert expected_rows.grad is not None
        assert torch.allclose(grads.double(), expected_rows.grad.view(-1, WIDTH), atol=1e-6)
        table.step(1e-2)
        assert not table._returned
    assert table.steps == 2
    with torch.autocast("cpu", torch.bfloat16):
        run(ids).backward()
    assert table._returned[0][1].dtype == torch.float32
    with torch.no_grad():
        assert not table(ids).requires_grad


def test_a_layer_takes_the_steps_of_sparse_adam() -> None:
    torch.manual_seed(0)
    table = RowTable.create(WIDTH, ROWS, optimizer="adam", deviation=0.3)
    embedding = torch.nn.Embedding.from_pretrained(everything(table), freeze=False, sparse=True)
    optimiser = torch.optim.SparseAdam(embedding.parameters(), lr=1e-2)
    for _ in range(5):
        ids, upstream = torch.randint(0, ROWS, (3, 4)), torch.randn(3, 4, WIDTH)
        for layer in (table, embedding):
            (layer(ids) * upstream).sum().backward()
        table.step(1e-2)
        optimiser.step()
        optimiser.zero_grad()
    assert torch.allclose(everything(table), embedding.weight, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMISERS)
def test_files_go_there_and_back_bit_for_bit(optimizer: str, tmp_path: Path, addressing: Addressing) -> None:
    layer = addressing.layer(14)
    first = RowTable.create(WIDTH, addressing=layer, where="store", optimizer=optimizer, deviation=0.2)
    ids, grads = torch.randint(0, layer.rows, (30,)), torch.randn(30, WIDTH)
    first.learn(ids, grads, 0.1)
    first.save(tmp_path / "store.table")
    on_device = RowTable.open(tmp_path / "store.table", where="device", addressing=layer)
    on_device.save(tmp_path / "device.table")
    assert (tmp_path / "device.table").read_bytes() == (tmp_path / "store.table").read_bytes()
    again = TrainableTable.open(tmp_path / "device.table", addressing=layer)
    assert np.array_equal(again.gather(np.arange(layer.rows)), everything(on_device).numpy())
    with pytest.raises(AddressMismatch):
        RowTable.open(tmp_path / "store.table", where="device", addressing=addressing.layer(1))


def test_files_of_many_blocks(tmp_path: Path) -> None:
    """More than one block of checksums, and rows that lie across two."""
    store = RowTable.create(100, 9000, where="store", optimizer="adam", deviation=1.0)
    store.learn(torch.arange(0, 9000, 7), torch.randn(1286, 100), 0.1)
    store.save(tmp_path / "store.table")
    RowTable.open(tmp_path / "store.table", where="device").save(tmp_path / "device.table")
    assert (tmp_path / "device.table").read_bytes() == (tmp_path / "store.table").read_bytes()


def test_state_dict_of_rows_on_the_device() -> None:
    _, table = both("adam")
    table.learn(torch.tensor([1, 2]), torch.ones(2, WIDTH), 0.1)
    _, other = both("adam")
    other.load_state_dict(table.state_dict())
    for one in (table, other):
        one.learn(torch.tensor([2, 3]), torch.ones(2, WIDTH), 0.1)
    assert torch.equal(everything(table), everything(other)) and other.steps == 2


def test_what_is_prefetched_sees_the_update() -> None:
    tables = [RowTable.create(WIDTH, ROWS, optimizer="adam", deviation=0.3) for _ in range(2)]
    batches = [torch.randint(0, ROWS, (4, 6)) for _ in range(8)]
    for ahead, table in zip((False, True), tables, strict=True):
        for number, ids in enumerate(batches):
            fetched = table.fetch(ids)
            if ahead and number + 1 < len(batches):
                table.prefetch(batches[number + 1])
            fetched.embed().square().sum().backward()
            table.update(fetched, 1e-2)
    assert torch.equal(everything(tables[0]), everything(tables[1]))


@pytest.mark.parametrize("where", ["store", "device"])
def test_wrong_ids_and_gradients(where: Any) -> None:
    table = RowTable.create(WIDTH, ROWS, where=where, optimizer="adam", deviation=0.3)
    for wrong in (ROWS, -1):
        with pytest.raises(ValueError, match=str(wrong)):
            table.fetch(torch.tensor([[1, wrong]]))
    with pytest.raises(ValueError, match="not finite|holds NaN"):
        table.learn(torch.tensor([1]), torch.full((1, WIDTH), torch.nan), 0.1)
    assert table.steps == 0
    with pytest.raises(ValueError, match="`rows`"):
        RowTable.create(WIDTH, where=where)


def test_store_rows_have_no_weights_in_the_state_dict() -> None:
    table, _ = both("adam")
    assert not table.state_dict() and not list(table.parameters())
