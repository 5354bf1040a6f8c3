"""Conditional memory for language models: addressing, tables of rows, row-sparse training.

Token ids become row ids (`Addressing`, `History`), row ids become rows (`Table`), rows learn (`TrainableTable`).
Arrays of other libraries are read and written in place: numpy arrays and whatever else has the buffer protocol, PyTorch
tensors on the CPU by DLPack. Neither library is needed; without `out`, results are memoryviews.

The parts that need PyTorch are `engram_lm.torch`, `engram_lm.train` and `engram_lm.hf`.
"""

from engram_lm import optimizers as optimizers
from engram_lm._core import (
    Addressing,
    AddressMismatch,
    DamagedError,
    FormatError,
    History,
    OverlayWriter,
    ReuseStats,
    Table,
    Ticket,
    TrainableTable,
    classes_of_tokenizer,
    convert,
    distinct,
    table_info,
    verify,
)

__version__ = "0.1.0"

__all__ = [
    "AddressMismatch",
    "Addressing",
    "DamagedError",
    "FormatError",
    "History",
    "OverlayWriter",
    "ReuseStats",
    "Table",
    "Ticket",
    "TrainableTable",
    "classes_of_tokenizer",
    "convert",
    "distinct",
    "optimizers",
    "table_info",
    "verify",
]
