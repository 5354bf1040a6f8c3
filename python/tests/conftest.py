"""What the tests share: a small addressing, and a small table of it."""

import json
from pathlib import Path

import numpy as np
import pytest

import engram_lm


@pytest.fixture(scope="session")
def addressing() -> engram_lm.Addressing:
    """Two memory layers over 50 tokens, each a class of its own."""
    config = {
        "seed": 0,
        "layers": [1, 14],
        "max_order": 3,
        "heads": 2,
        "base_rows": [100, 100],
        "pad_id": 2,
    }
    return engram_lm.Addressing._from_config(json.dumps(config), np.arange(50))


@pytest.fixture
def table_file(tmp_path: Path, addressing: engram_lm.Addressing) -> Path:
    """A table of the first memory layer, 8 normal values a row."""
    layer = addressing.layer(1)
    table = engram_lm.TrainableTable.create(8, addressing=layer, optimizer="adam", deviation=1.0, seed=3)
    table.save(tmp_path / "layer1.table")
    return tmp_path / "layer1.table"
