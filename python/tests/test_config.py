"""Configurations: those of the repository are read, wrong ones are refused by key, and TOML goes there and back."""

import tomllib
from pathlib import Path

import pytest

from engram_lm import config
from repository import CONFIGS

FILES = sorted(CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_repositorys_configurations(path: Path, tmp_path: Path) -> None:
    run = config.load_run_config(path)
    written = tmp_path / "run.toml"
    written.write_text(config.to_toml(run))
    assert config.load_run_config(written) == run


WRONG = [
    ("width = 128", "width = 128\nwidht = 3", "`model.widht` is no key"),
    ("width = 128", "", "`model.width` is missing"),
    ("width = 128", 'width = "wide"', "`model.width` is 'wide', but must be an integer"),
    ("width = 128", "width = -1", "`model.width` is -1"),
    ('kind = "latent"', 'kind = "lattice"', "`model.attention.kind` is 'lattice'"),
    ("rotary_width = 16", "rotary_width = 15", "even width"),
    ("active = 2", "active = 9", "`model.experts.active`: is more than the 8 routed"),
    ("first_block = 1", "first_block = 4", "`model.experts.first_block`"),
    ("streams = 4", "streams = 1", "`model.hyper_connections.streams`"),
    ("layers = [1]", "layers = [4]", "`model.memory.layers`"),
    ("layers = [1]", "layers = [2, 1]", "`model.memory.layers`"),
    ("max_order = 3", "max_order = 4", "`model.memory.rows_per_head`"),
    ("batch = 16", "batch = 16\naccumulation = 3", "`train.accumulation`"),
    ("batch = 16", "batch = true", "`train.batch` is True"),
    ("wsd = {", "wds = {", "`train.schedule.decay`"),
    ('shape = "linear"', 'shape = "round"', "`train.schedule.decay.wsd.shape`"),
    ("[model]", "[model", "line"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), WRONG)
def test_wrong_configurations_are_refused_by_key(right: str, wrong: str, message: str, tmp_path: Path) -> None:
    text = (CONFIGS / "quickstart-memory.toml").read_text()
    assert right in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(config.ConfigError, match="wrong.toml: ") as raised:
        config.load_run_config(path)
    assert message in str(raised.value)


def test_texts_with_signs_go_there_and_back() -> None:
    nasty = 'a "quoted" \\ back\nslash\t<｜end▁of▁sentence｜>'
    text = f"value = {config._toml(nasty)}"
    assert tomllib.loads(text) == {"value": nasty}


def test_schedules() -> None:
    def rates(decay: object, warmup: int, *steps: int) -> list[float]:
        schedule = config.Schedule(decay, warmup)
        schedule.check()
        return [round(schedule.rate(step, 100), 6) for step in steps]

    assert rates("constant", 4, 0, 1, 3, 4, 99, 500) == [0.25, 0.5, 1, 1, 1, 1]
    step = {"step": [{"after": 0.8, "factor": 0.5}, {"after": 0.9, "factor": 0.25}]}
    assert rates(step, 10, 79, 80, 90, 100) == [1, 0.5, 0.125, 0.125]
    assert rates({"cosine": {"floor": 0.1}}, 20, 60, 100, 500) == [0.55, 0.1, 0.1]
    linear = {"wsd": {"fraction": 0.5, "shape": "linear", "floor": 0.5}}
    assert rates(linear, 10, 9, 50, 75, 100) == [1, 1, 0.75, 0.5]
