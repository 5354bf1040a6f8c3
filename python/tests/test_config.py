"""Configurations: those of the repository are read, wrong ones are refused by key, and TOML goes there and back."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from engram_lm import config
from engram_lm.toml_file import value_to_toml
from repository import CONFIGS, REPOSITORY

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
    ("batch = 16", "batch = 16\naccumulation = 0", "`train.accumulation`: is 0"),
    ("batch = 16", "batch = 16\naccumulation = 17", "`train.accumulation`: is 17, but a batch of 16"),
    ("batch = 16", "batch = 16\naccumulation = 4\nmicro_batch = 4", "leave it out"),
    ("batch = 16", "batch = 16\nmicro_batch = 17", "`train.micro_batch`: is more than the batch of 16"),
    ("batch = 16", "batch = 16\nmicro_batch = 0", "`train.micro_batch`: is 0"),
    ("active = 2", "active = 2\nscaling = 0.0", "`model.experts.scaling`"),
    ("active = 2", "active = 2\nsequence_balance = -1.0", "`model.experts.sequence_balance`"),
    ("max_order = 3", 'max_order = 3\ngate = "none"\ngate_form = "sigmoid"', "`model.memory.gate_form`"),
    ("[train]", "[model.init]\nhead = -0.1\n\n[train]", "`model.init.head`"),
    ("rate_factor = 2.5", 'optimizer = "frozen"', "rows that stay zero"),
    ("rate_factor = 2.5", "beta2 = 1.0", "`train.memory.beta2`: must be at least 0"),
    ("rate_factor = 2.5", "epsilon = 0.0", "`train.memory.epsilon`: must be above 0"),
    (
        "rate_factor = 2.5",
        'optimizer = "row_wise_adam"\nbeta1 = 0.9',
        '`train.memory.beta1`: is a setting that only "adam" has',
    ),
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


def test_several_sources_are_read_and_written_and_refused_by_key(tmp_path: Path) -> None:
    text = (CONFIGS / "quickstart-memory.toml").read_text()
    one = text.split("[data]\n")[1].split("\n\n", 1)[0]
    source = '[[data.source]]\nname = "{}"\ntrain = "{}"\nweight = {}\n'
    sources = source.format("web", "w", 3) + source.format("code", "c", 1.5) + 'valid = "v"\n'
    mixed = text.replace(one, 'tokenizer = "t"\n' + sources)
    path = tmp_path / "mixed.toml"
    path.write_text(mixed)
    run = config.load_run_config(path)
    assert run.data is not None and run.data.source is not None and run.data.train is None
    assert [(each.name, each.train, each.valid, each.weight) for each in run.data.source] == [
        ("web", tmp_path / "w", None, 3.0),
        ("code", tmp_path / "c", tmp_path / "v", 1.5),
    ]
    written = tmp_path / "run.toml"
    written.write_text(config.to_toml(run))
    assert config.load_run_config(written) == run
    for right, wrong, key in [
        ("weight = 1.5", "weight = 0", "data.source[1].weight"),
        ('tokenizer = "t"', 'tokenizer = "t"\ntrain = "w"', "data.train"),
        ('name = "web"\n', "", "data.source[0].name"),
    ]:
        path.write_text(mixed.replace(right, wrong, 1))
        with pytest.raises(config.ConfigError) as raised:
            config.load_run_config(path)
        assert key in str(raised.value)


MODEL = """
[model]
vocabulary = 8
width = 4
blocks = 2
context = 4
feed_forward = { width = 8 }

[model.attention]
kind = "plain"
heads = 2
head_width = 2
"""


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)


def test_a_file_states_what_differs_from_its_base(tmp_path: Path) -> None:
    write(
        tmp_path,
        a=MODEL,
        b='base = "a.toml"\nmodel.width = 6\nmodel.attention.key_heads = 1\n',
        c='base = "b.toml"\nremove = ["model.attention.key_heads"]\nmodel.attention.heads = 4\n',
        d="""base = "c.toml"
[model.attention]
kind = "latent"
heads = 1
latent_rank = 2
content_width = 2
rotary_width = 2
value_width = 2
""",
    )
    a, b, c, d = (config.load_model_config(tmp_path / f"{name}.toml") for name in "abcd")
    assert (a.width, b.width, c.width, d.width) == (4, 6, 6, 6)
    assert isinstance(b.attention, config.PlainAttentionConfig) and b.attention.key_heads == 1
    assert isinstance(c.attention, config.PlainAttentionConfig)
    assert (c.attention.heads, c.attention.head_width, c.attention.key_heads) == (4, 2, None)
    assert isinstance(d.attention, config.LatentAttentionConfig) and d.attention.heads == 1


def test_what_is_refused_names_the_file_that_states_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        a=MODEL,
        wrong=MODEL.replace("width = 4", 'width = "wide"'),
        own='base = "a.toml"\nmodel.width = "wide"\n',
        theirs='base = "wrong.toml"\nmodel.blocks = 3\n',
        unknown='base = "a.toml"\nmodel.widht = 3\n',
        gone='base = "a.toml"\nremove = ["model.size"]\n',
        number="base = 3\n",
        list='base = "a.toml"\nremove = 3\n',
        one='base = "other.toml"\n',
        other='base = "one.toml"\n',
    )
    refused = {
        "own": "own.toml: `model.width` is 'wide'",
        "theirs": "wrong.toml: `model.width` is 'wide'",
        "unknown": "unknown.toml: `model.widht` is no key",
        "gone": "gone.toml: `remove`: the base has no key `model.size`",
        "number": "number.toml: `base`: must be the path of a file",
        "list": "list.toml: `remove`: must be a list of dotted keys",
        "one": "is based on itself",
    }
    for name, message in refused.items():
        with pytest.raises(config.ConfigError) as raised:
            config.load_model_config(tmp_path / f"{name}.toml")
        assert message in str(raised.value), name


def test_the_key_of_before_is_translated(tmp_path: Path) -> None:
    text = (CONFIGS / "quickstart-memory.toml").read_text()
    write(tmp_path, run=text.replace("batch = 16", "batch = 16\naccumulation = 3"))
    run = config.load_run_config(tmp_path / "run.toml")
    assert run.train is not None and run.train.micro_batch == 6


def test_the_ramp_by_the_index_is_that_of_deepseek() -> None:
    """DeepSeek-V2's published settings make a ramp from pair 10 to pair 23."""
    plain = [10_000.0 ** (-2 * pair / 64) for pair in range(32)]
    yarn = config.YarnConfig(4096, scale=40.0, ramp="index")
    for pair, found in enumerate(yarn.frequencies(plain, 10_000.0)):
        stretched = min(max((pair - 10) / 13, 0.0), 1.0)
        expected = plain[pair] / 40 * stretched + plain[pair] * (1 - stretched)
        assert found == pytest.approx(expected, rel=1e-12), pair


def test_texts_with_signs_go_there_and_back() -> None:
    nasty = 'a "quoted" \\ back\nslash\t<｜end▁of▁sentence｜>'
    text = f"value = {value_to_toml(nasty)}"
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


# What describes pretrained models, which the twin does not compute: `engram_lm.hf` puts a memory before their blocks.
OF_PRETRAINED = {
    "model": {"embedding_scale", "post_norms"},
    "model.attention latent": {"scale", "rotary_scaling"},
    "model.attention plain": {
        *("rotary_width", "query_key_norm", "bias", "output_bias", "scale", "window", "local_blocks"),
        *("local_rotary_base", "unrotated_blocks", "rotary_scaling"),
    },
    "model.feed_forward": {"activation"},
    "model.experts": {"dense_blocks", "score", "normalise", "groups"},
}
TABLES: dict[str, type] = {
    "model": config.ModelConfig,
    "model.init": config.InitConfig,
    "model.attention latent": config.LatentAttentionConfig,
    "model.attention plain": config.PlainAttentionConfig,
    "model.feed_forward": config.FeedForwardConfig,
    "model.experts": config.ExpertsConfig,
    "model.hyper_connections": config.HyperConnectionConfig,
    "model.memory": config.MemoryConfig,
    "text": config.TextConfig,
    "data": config.DataConfig,
    "train": config.TrainConfig,
    "train.optimizer": config.OptimizerConfig,
    "train.memory": config.RowTraining,
}


def documented_keys() -> dict[str, set[str]]:
    """The keys of each table of docs/configuration.md; those of a `kind` under both names."""
    found: dict[str, set[str]] = {}
    section = ""
    for line in (REPOSITORY / "docs/configuration.md").read_text().splitlines():
        if heading := re.match(r"#+ `\[?([\w.]+)\]?`", line):
            section = heading[1]
        elif kind := re.match(r'\*\*`kind = "(\w+)"`', line):
            section = f"{section.split()[0]} {kind[1]}"
        elif line.startswith("#"):
            section = ""
        elif key := re.match(r"\| `(\w+)` \|", line):
            found.setdefault(section, set()).add(key[1])
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_key_of_the_reference_is_known(table: str) -> None:
    known = {field.name for field in dataclasses.fields(TABLES[table])} - {"kind"}
    left_out = OF_PRETRAINED.get(table, set())
    assert known & left_out == set()
    assert known | left_out == documented_keys()[table]
