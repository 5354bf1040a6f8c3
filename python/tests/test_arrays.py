"""Arrays are used in place; a wrong one is refused by name, with what it is and what is needed."""

import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engram_lm import Addressing, Table

IDS = np.array([[3, 0], [3, 5]])


def test_results_without_out_are_memoryviews(table_file: Path) -> None:
    table = Table.open(table_file)
    rows = table.gather(IDS)
    assert isinstance(rows, memoryview)
    assert (rows.shape, rows.format) == ((2, 2, 8), "f")
    assert np.asarray(table.gather(array.array("q", [3, 5]))).shape == (2, 8)
    assert len(table.gather(np.zeros((0,), np.int64))) == 0


def test_the_last_two_dimensions_of_out_may_be_joined(table_file: Path) -> None:
    table = Table.open(table_file)
    joined = np.empty((2, 16), np.float32)
    assert table.gather(IDS, joined) is joined
    assert np.array_equal(joined.reshape(2, 2, 8), table.gather(IDS))


def test_sixteen_bits(table_file: Path) -> None:
    table = Table.open(table_file)
    exact = np.asarray(table.gather(IDS))
    half = table.gather(IDS, np.empty((2, 2, 8), np.float16))
    assert np.array_equal(half, exact.astype(np.float16))
    bits = np.asarray(table.gather(IDS, dtype="bf16"))
    assert bits.dtype == np.uint16
    brain = (bits.astype(np.uint32) << 16).view(np.float32)
    assert np.all(np.abs(brain - exact) <= np.abs(exact) / 256)
    assert np.array_equal(bits, table.gather(IDS, np.empty((2, 2, 8), np.uint16), "bf16"))


Call = Callable[[Table, Addressing], Any]

REFUSED: dict[str, tuple[Call, type[Exception], str]] = {
    "ids of floats": (
        lambda t, a: t.gather(IDS.astype(float)),
        TypeError,
        "`ids` holds float64.*int64 or uint64",
    ),
    "ids of 32 bits": (lambda t, a: t.gather(IDS.astype(np.int32)), TypeError, "`ids` holds int32"),
    "ids that are none": (lambda t, a: t.gather(cast(Any, "abc")), TypeError, "`ids` is a str: pass an array"),
    "a list of texts": (lambda t, a: t.gather(cast(Any, ["a"])), TypeError, "`ids`: a list may hold integers only"),
    "big-endian ids": (lambda t, a: t.gather(IDS.astype(">i8")), TypeError, 'format ">q"'),
    "transposed ids": (
        lambda t, a: t.gather(IDS.T),
        ValueError,
        r"`ids`.*strides of \[8, 16\] bytes.*contiguous",
    ),
    "ids with a step": (lambda t, a: t.gather(np.arange(9)[::2]), ValueError, "`ids`.*not C-contiguous"),
    "a negative id": (lambda t, a: t.gather([1, -1]), ValueError, "`ids` holds -1 at position 1"),
    "an id beyond the table": (lambda t, a: t.gather([1, 2, 10_000]), ValueError, "row 10000, at position 2"),
    "out of another type": (
        lambda t, a: t.gather(IDS, np.empty((2, 2, 8))),
        TypeError,
        "`out` holds float64, but must hold float32",
    ),
    "out of another shape": (
        lambda t, a: t.gather(IDS, np.empty((2, 2, 9), np.float32)),
        ValueError,
        r"`out` has the shape \[2, 2, 9\], but must have \[2, 2, 8\]",
    ),
    "out with as many values": (
        lambda t, a: t.gather(IDS, np.empty((4, 8), np.float32)),
        ValueError,
        r"must have \[2, 2, 8\]",
    ),
    "out that is transposed": (
        lambda t, a: t.gather(IDS, np.empty((8, 2, 2), np.float32).T),
        ValueError,
        "`out`.*not C-contiguous",
    ),
    "out that is read-only": (
        lambda t, a: t.gather([0], np.frombuffer(bytes(32), np.float32).reshape(1, 8)),
        ValueError,
        "`out` is read-only",
    ),
    "out that is not aligned": (
        lambda t, a: t.gather([0], np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float32).reshape(1, 8)),
        ValueError,
        "`out` is not aligned to 4 bytes",
    ),
    "another dtype than out has": (
        lambda t, a: t.gather([0], np.empty((1, 8), np.float32), "f16"),
        TypeError,
        "`out` holds float32, but must hold float16",
    ),
    "an unknown dtype": (lambda t, a: t.gather([0], dtype="f64"), ValueError, '`dtype` is "f64"'),  # type: ignore[arg-type]
    "out over ids": (lambda t, a: overlapping(t), ValueError, "`out` and `ids` share memory"),
    "stored rows of floats": (
        lambda t, a: t.lookup_into([0], np.empty((1, 32), np.float32)),
        TypeError,
        "`out` holds float32, but must hold uint8",
    ),
    "stored rows of another width": (
        lambda t, a: t.lookup_into([0], np.empty((1, 31), np.uint8)),
        ValueError,
        r"\[1, 31\], but must have \[1, 32\]",
    ),
    "tokens of floats": (lambda t, a: a.row_ids(np.zeros(3)), TypeError, "`tokens` holds float64"),
    "a single token": (lambda t, a: a.row_ids(np.array(3)), ValueError, "`tokens` is a single number"),
    "a negative token": (
        lambda t, a: a.row_ids(np.array([4, -5])),
        ValueError,
        "`tokens` holds -5 at position 1",
    ),
    "a negative token of 32 bits": (
        lambda t, a: a.row_ids(np.array([4, -5], np.int32)),
        ValueError,
        "`tokens` holds -5 at position 1",
    ),
    "a huge token": (lambda t, a: a.row_ids([2**40]), ValueError, f"`tokens` holds {2**40}"),
    "a token outside the vocabulary": (
        lambda t, a: a.row_ids(np.array([[0, 1], [0, 50]])),
        ValueError,
        "token 50 at position 1 is outside the vocabulary, which has ids 0 to 49",
    ),
    "a mask of another shape": (
        lambda t, a: a.row_ids([1, 2], dead=np.zeros(3, bool)),
        ValueError,
        r"`dead` has the shape \[3\], but must have \[2\]",
    ),
    "a mask of integers": (
        lambda t, a: a.row_ids([1], starts=np.zeros(1, int)),
        TypeError,
        "`starts` holds int64",
    ),
    "a mask of other numbers": (
        lambda t, a: a.row_ids([1], dead=np.array([2], np.uint8)),
        ValueError,
        "`dead` holds 2 at position 0",
    ),
    "ids of 32 bits for out": (
        lambda t, a: a.row_ids([1], out=np.empty((1, 4), np.int32)),
        TypeError,
        "`out` holds int32, but must hold int64 or uint64",
    ),
}


def overlapping(table: Table) -> None:
    memory = np.zeros(8, np.int64)
    table.gather(memory[:1], memory[:4].view(np.float32).reshape(1, 8))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, table_file: Path, addressing: Addressing) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call(Table.open(table_file), addressing.layer(1))


def test_a_refused_call_writes_nothing(table_file: Path) -> None:
    out = np.full((2, 8), 7, np.float32)
    with pytest.raises(ValueError, match="row 10000"):
        Table.open(table_file).gather([1, 10_000], out)
    assert (out == 7).all()


def test_tensors_of_pytorch_in_place(table_file: Path, addressing: Addressing) -> None:
    torch = pytest.importorskip("torch")
    table, layer = Table.open(table_file), addressing.layer(1)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ids = torch.empty(2, 3, layer.slots, dtype=torch.int64)
    assert layer.row_ids(tokens, out=ids) is ids
    assert np.array_equal(ids.numpy(), layer.row_ids(tokens.numpy()))
    exact = torch.empty(2, 3, layer.slots * 8)
    table.gather(ids, exact)
    assert np.array_equal(exact.numpy().reshape(2, 3, layer.slots, 8), table.gather(ids.numpy()))
    brain = table.gather(ids, torch.empty_like(exact, dtype=torch.bfloat16))
    assert torch.equal(brain, exact.bfloat16())
    with pytest.raises(ValueError, match="not C-contiguous"):
        table.gather(ids.transpose(0, 1))
    with pytest.raises(ValueError, match="detach"):
        table.gather(ids, exact.requires_grad_())
    with pytest.raises(ValueError, match="accelerator"):
        table.gather(OnDevice())


class OnDevice:
    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self) -> object:
        raise AssertionError("not asked for")


def test_tensors_that_are_not_plain(table_file: Path) -> None:
    """Views, parameters, subclasses and negated tensors are what they say, or refused; never misread."""
    torch = pytest.importorskip("torch")

    class Subclass(torch.Tensor):  # type: ignore[misc, name-defined, unused-ignore]
        pass

    table = Table.open(table_file)
    ids = torch.arange(12)
    expected = np.asarray(table.gather(ids.tolist()))
    behind = torch.zeros(20, 8)
    table.gather(ids, behind[3:15])  # a view that begins in the middle
    assert np.array_equal(behind[3:15], expected) and not behind[:3].any() and not behind[15:].any()
    parameter = torch.nn.Parameter(torch.zeros(12, 8), requires_grad=False)
    table.gather(ids.as_subclass(Subclass), parameter)
    assert np.array_equal(parameter, expected)
    with pytest.raises(ValueError, match="detach it first"):
        table.gather(ids, torch.zeros(12, 8, requires_grad=True))
    with pytest.raises(ValueError, match="`out` is not C-contiguous|`out`.*contiguous"):
        table.gather(ids, torch.zeros(8, 12).T)
    with pytest.raises(TypeError, match="`ids` holds int32"):
        table.gather(ids.int())
    with pytest.raises((TypeError, ValueError)):
        table.gather(ids, torch.zeros(12, 8).to_sparse())
    negated = torch.zeros(12, 8, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises((TypeError, ValueError)):
        table.gather(ids, negated)
