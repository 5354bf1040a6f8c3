"""The guide, docs/python.md, runs from its beginning to its end."""

import os
import re
from pathlib import Path

import pytest

from repository import REPOSITORY

pytest.importorskip("torch")
pytest.importorskip("safetensors")

GUIDE = REPOSITORY / "docs/python.md"


def test_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    text = GUIDE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        source = "\n" * line + block.group(1)  # so that an error names the guide's own line
        exec(compile(source, str(GUIDE), "exec"), names)


def test_every_public_thing_says_what_it_is() -> None:
    import engram_lm

    for name in engram_lm.__all__:
        thing = getattr(engram_lm, name)
        assert (thing.__doc__ or "").strip(), name
        if isinstance(thing, type):
            for method, value in vars(thing).items():
                if not method.startswith("_") and (callable(value) or hasattr(value, "__get__")):
                    assert (getattr(value, "__doc__", None) or "").strip(), f"{name}.{method}"


def test_the_stubs_are_complete() -> None:
    """What the compiled part has is in its stubs, and the other way round."""
    import ast

    from engram_lm import _core

    stubs = ast.parse((Path(_core.__file__).with_name("_core.pyi")).read_text())
    classes = {node.name: node for node in stubs.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in stubs.body if isinstance(node, ast.FunctionDef)}
    for name, thing in vars(_core).items():
        if name.startswith("__"):
            continue
        if not isinstance(thing, type):
            assert name in functions, name
            continue
        stubbed = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
        found = {member for member in vars(thing) if not member.startswith("__")}
        assert found == {member for member in stubbed if not member.startswith("__")}, name
    assert os.path.exists(Path(_core.__file__).with_name("py.typed"))
