"""Trained table files, written and read section by section: for rows that live elsewhere than in `TrainableTable`.

The layout is that of docs/table-file.md: a header of 4096 bytes, the rows and each kind of optimiser state as sections
padded to 4096 bytes, then a BLAKE3 hash of every MiB. Memory does not depend on the table's size.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from engram_lm import optimizers
from engram_lm._core import blake3_of, table_info, verify
from engram_lm.optimizers import Adam, AdamByRow, BalancedMomentum, Frozen, RowOptimizer, RowWiseAdam

HEADER = 4096
PAGE = 4096
BLOCK = 1 << 20
Floats = NDArray[np.float32]
# Gives the values of rows first..last of a section, [last - first, width of the section].
Read = Callable[[int, int], Floats]


@dataclass(frozen=True)
class TrainedHeader:
    """What a trained table file says of itself."""

    rows: int
    width: int
    optimizer: RowOptimizer
    step: int
    identity: str
    layer: int

    @property
    def widths(self) -> list[int]:
        """Values per row, and of each kind of state that there is."""
        return [self.width, *state_widths(self.optimizer, self.width)]


def state_widths(optimizer: RowOptimizer, width: int) -> list[int]:
    """Values per row of each kind of state."""
    if isinstance(optimizer, Adam):
        return [width, width]
    if isinstance(optimizer, AdamByRow):
        return [width, width + 1]  # the count of the row's updates stands last
    if isinstance(optimizer, RowWiseAdam):
        return [1]
    return [width] if isinstance(optimizer, BalancedMomentum) else []


def read_header(path: str | os.PathLike[str]) -> TrainedHeader:
    """The header of the trained table at `path`. Raises `FormatError`, `DamagedError`; `ValueError` without state."""
    info = table_info(path)
    if "optimizer" not in info:
        raise ValueError(f"{path}: its rows have no optimiser state")
    optimizer = optimizers.from_json(info["optimizer"])
    return TrainedHeader(info["rows"], info["width"], optimizer, info["step"], info["identity"], info["layer"])


def open_sections(path: str | os.PathLike[str], check: bool = True) -> tuple[TrainedHeader, list[Floats]]:
    """Header and sections of a trained table, mapped, read-only: the rows, then each kind of state.

    `check`: whether every block is compared with its checksum first.
    """
    header = read_header(path)
    if check:
        verify(path)
    sections, offset = [], HEADER
    for width in header.widths:
        shape = (header.rows, width)
        sections.append(np.memmap(path, "<f4", "r", offset, shape))
        offset += _padded(4 * header.rows * width)
    return header, list(sections)


def write(path: str | os.PathLike[str], header: TrainedHeader, sections: Sequence[Read]) -> None:
    """Writes a trained table from what `sections` give, one for the rows and one for each kind of state.

    The file is whole or not there. Raises `OSError` if the file system refuses.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(bytes(HEADER))
            hashes = [
                digest
                for width, read in zip(header.widths, sections, strict=True)
                for digest in _section(file, header.rows, width, read)
            ]
            listed = b"".join(hashes)
            file.write(listed)
            file.seek(0)
            file.write(_header(header, listed))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _section(file: BinaryIO, rows: int, width: int, read: Read) -> Iterator[bytes]:
    """Writes one section; gives the hash of each of its blocks."""
    at_a_time = max(1, BLOCK // (4 * width))
    waiting = bytearray()
    for first in range(0, rows, at_a_time):
        values = np.ascontiguousarray(read(first, min(first + at_a_time, rows)), dtype="<f4")
        waiting += values.tobytes()
        while len(waiting) >= BLOCK:
            yield _block(file, bytes(waiting[:BLOCK]))
            del waiting[:BLOCK]
    if waiting:
        yield _block(file, bytes(waiting).ljust(_padded(len(waiting)), b"\0"))


def _block(file: BinaryIO, block: bytes) -> bytes:
    file.write(block)
    return bytes.fromhex(blake3_of(block))


def _header(header: TrainedHeader, listed: bytes) -> bytes:
    optimizer = header.optimizer
    settings: dict[str, Any] = asdict(optimizer)
    count = settings.pop("iterations", 0)
    kind = {Adam: 1, RowWiseAdam: 2, BalancedMomentum: 3, Frozen: 4, AdamByRow: 5}[type(optimizer)]
    values = list(settings.values())
    numbers = {1: values, 2: [0.0, *values], 3: values, 4: [0.0] * 3, 5: values}[kind]
    head = struct.pack("<8sIIQQQ", b"ENGRAMTB", 1, 0, header.rows, header.width, header.layer)
    head += bytes.fromhex(header.identity)
    head += struct.pack("<QII3dQ", header.step, kind, count, *numbers, BLOCK)
    head += bytes.fromhex(blake3_of(listed))
    head = head.ljust(HEADER - 32, b"\0")
    return head + bytes.fromhex(blake3_of(head))


def _padded(count: int) -> int:
    return -(-count // PAGE) * PAGE
