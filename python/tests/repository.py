"""Files of the repository that the tests compare with."""

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN_ADDRESSING = REPOSITORY / "crates/address/tests/golden"
GOLDEN_MODULES = REPOSITORY / "crates/engram/tests/golden"
CONFIGS = REPOSITORY / "configs"


def golden(name: str) -> Any:
    return json.loads((GOLDEN_ADDRESSING / name).read_text())
