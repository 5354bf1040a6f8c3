"""Engram in PyTorch: the memory module, tables of rows, and the whole language model.

* `Memory`: reads rows into the residual streams (arXiv 2601.07372, section 2.3), in the paper's and V4.1's form.
* `RowTable`: rows on the device or in our store behind one interface, learning row by row. Nothing is ever the size of
  a table but the table.
* `LanguageModel`: the model that the Rust trainer trains, from the same configuration, with the same weights by the
  same names. `Checkpoint` loads and saves what both write: train in one, continue in the other.
* `Muon` and `Adam` as the Rust trainer has them: `Optimizer`.
"""

from engram_lm.torch.checkpoint import Checkpoint, CheckpointWriter
from engram_lm.torch.memory import Memory
from engram_lm.torch.model import LanguageModel
from engram_lm.torch.optimizer import Optimizer
from engram_lm.torch.rows import DeviceRows, RowTable, StoreRows

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "DeviceRows",
    "LanguageModel",
    "Memory",
    "Optimizer",
    "RowTable",
    "StoreRows",
]
