"""What works without numpy and PyTorch: run by `ci` in an environment that has neither, not by pytest."""

import array
import asyncio
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import engram_lm

assert importlib.util.find_spec("numpy") is None and importlib.util.find_spec("torch") is None

addressing = engram_lm.Addressing.preset("demo", classes=99_092).layer(1)
ids = addressing.row_ids(array.array("i", [237, 5095, 251]))
assert isinstance(ids, memoryview) and ids.shape == (3, 16)
history = addressing.history()
assert bytes(history.extend([237])) + bytes(history.extend([5095, 251])) == bytes(ids)


def list_of(rows: Any) -> list[list[float]]:
    """The rows of a view."""
    listed: list[list[float]] = rows.tolist()
    return listed


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "rows.table"
    table = engram_lm.TrainableTable.create(4, 100, optimizer=engram_lm.optimizers.Adam(beta2=0.99), deviation=1.0)
    before = table.gather([3, 7]).tolist()
    grads = memoryview(array.array("f", [1.0] * 8)).cast("B").cast("f", [2, 4])
    table.update([7, 3], grads, 0.5)
    after = table.gather([3, 7]).tolist()
    moved = [b - a for row, new in zip(before, after, strict=True) for b, a in zip(row, new, strict=True)]
    assert all(abs(step - 0.5) < 1e-5 for step in moved), moved
    table.save(path)
    opened = engram_lm.Table.open(path, tier="direct", cache="1MiB")
    assert opened.gather([3, 7]).tolist() == after

    async def fetch() -> list[list[float]]:
        return list_of(await opened.prefetch([3, 7]))

    assert asyncio.run(fetch()) == after
    engram_lm.verify(path)
    stored = bytearray(32)
    opened.lookup_into([3, 7], memoryview(stored).cast("B", [2, 16]))
    assert memoryview(stored).cast("f").tolist() == after[0] + after[1]
try:
    import engram_lm.torch
except ModuleNotFoundError as error:
    assert error.name in ("torch", "safetensors", "numpy"), error
else:
    sys.exit("engram_lm.torch was imported without PyTorch")
print("works without numpy and PyTorch")
