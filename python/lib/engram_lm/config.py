"""A run's configuration file: the same TOML, keys and defaults as the command `engram train`.

Unknown keys, missing keys and values of the wrong type are errors that name the file and the key.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from engram_lm import toml_file
from engram_lm.toml_file import ConfigError as ConfigError
from engram_lm.toml_file import Source

# --- [model] ------------------------------------------------------------------------------------------------


@dataclass
class YarnConfig:
    """How rotary positions are stretched (YaRN, arXiv 2309.00071)."""

    original_context: int
    scale: float = 10.0
    alpha: float = 1.0
    beta: float = 32.0
    factor: float = 0.707
    ramp: Literal["turns", "index"] = "turns"

    def frequencies(self, plain: list[float], base: float) -> list[float]:
        """Radians per position of each pair, from the `plain` ones of the base `base`.

        A pair that turns fully less than α times over the original context turns slower by the scale; one that turns
        more than β times stays; between the two, in proportion: to its turns (the paper), or to its index between ends
        that are rounded outwards to whole pairs (DeepSeek's code).
        """
        width = 2 * len(plain)
        if self.ramp == "turns":
            turns = [self.original_context * f / math.tau for f in plain]
            kept = [min(max((t - self.alpha) / (self.beta - self.alpha), 0.0), 1.0) for t in turns]
            return [f + (1 - k) * (f / self.scale - f) for f, k in zip(plain, kept, strict=True)]

        def pair(turns: float) -> float:
            return width * math.log(self.original_context / (turns * math.tau)) / (2 * math.log(base))

        first, last = max(math.floor(pair(self.beta)), 0), min(math.ceil(pair(self.alpha)), width - 1)
        length = last - first or 0.001
        stretched = [min(max((index - first) / length, 0.0), 1.0) for index in range(len(plain))]
        return [f / self.scale * s + f * (1 - s) for f, s in zip(plain, stretched, strict=True)]

    @property
    def inverse_temperature(self) -> float:
        """What attention scores are multiplied by."""
        return float((0.1 * self.factor * math.log(self.scale) + 1.0) ** 2)


@dataclass
class LatentAttentionConfig:
    """Multi-head latent attention with decoupled rotary dimensions (arXiv 2405.04434, section 2.1)."""

    heads: int
    latent_rank: int
    content_width: int
    rotary_width: int
    value_width: int
    kind: Literal["latent"] = "latent"
    query_rank: int | None = None
    rotary_base: float = 10_000.0
    yarn: YarnConfig | None = None

    @property
    def rotary(self) -> int:
        """Width of a head's rotary part."""
        return self.rotary_width


@dataclass
class PlainAttentionConfig:
    """Multi-head attention with rotary positions over whole heads, keys and values shared by groups of heads."""

    heads: int
    head_width: int
    kind: Literal["plain"] = "plain"
    key_heads: int | None = None
    rotary_base: float = 10_000.0

    @property
    def rotary(self) -> int:
        """Width of a head's rotary part: all of it."""
        return self.head_width

    @property
    def yarn(self) -> YarnConfig | None:
        """Plain attention is not stretched."""
        return None


@dataclass
class FeedForwardConfig:
    """A SwiGLU feed-forward."""

    width: int


@dataclass
class ExpertsConfig:
    """Routed experts beside shared ones, sigmoid scores, loss-free balancing (arXiv 2401.06066, 2408.15664)."""

    first_block: int
    routed: int
    active: int
    width: int
    shared_width: int
    scaling: float = 1.0
    balance_rate: float = 1e-3
    sequence_balance: float = 0.0


@dataclass
class InitConfig:
    """Standard deviations of the weights at the start; those of projections times the root of their inputs."""

    embedding: float = 0.02
    head: float = 0.02
    projection: float = 1.0
    output: float | None = None


@dataclass
class HyperConnectionConfig:
    """Hyper-connections whose residual mixing is doubly stochastic (arXiv 2512.24880)."""

    streams: int
    sinkhorn_iterations: int = 20


@dataclass
class MemoryConfig:
    """The memory: hashed n-gram tables and the module that reads them (arXiv 2601.07372)."""

    layers: list[int]
    max_order: int
    heads: int
    row_width: int
    rows_per_head: list[int]
    form: Literal["paper", "v41", "added", "over_encoding", "attention_values"] = "paper"
    gate: Literal["per_stream", "shared", "none"] = "per_stream"
    gate_form: Literal["signed_root", "sigmoid"] = "signed_root"
    convolution: bool | None = None
    compression: Literal["normalised", "none"] = "normalised"
    lookup: Literal["own", "permuted"] = "own"
    seed: int = 0
    pad_id: int = 0
    kernel: int = 4
    row_init: float = 0.0

    @property
    def slots(self) -> int:
        """Rows that a token reads: one per order and head."""
        return (self.max_order - 1) * self.heads

    @property
    def width(self) -> int:
        """Width of a token's rows side by side, d_mem."""
        return self.slots * self.row_width

    @property
    def has_convolution(self) -> bool:
        """Whether a short convolution follows the gate."""
        return self.form == "paper" if self.convolution is None else self.convolution

    @property
    def departs(self) -> str | None:
        """The first key by which this memory departs from both published forms; none: it does not."""
        published: dict[str, bool] = {
            "model.memory.form": self.form in ("paper", "v41"),
            "model.memory.gate": self.gate == "per_stream",
            "model.memory.gate_form": self.gate_form == "signed_root",
            "model.memory.convolution": self.has_convolution == (self.form == "paper"),
            "model.memory.lookup": self.lookup == "own",
        }
        return next((key for key, kept in published.items() if not kept), None)

    def check(self, model: "ModelConfig") -> None:
        """Refuses what no memory of `model` could have, by its key."""
        orders, gated = self.max_order - 1, self.form in ("paper", "v41")
        _require(2 <= self.max_order <= 8, "model.memory.max_order", "must be 2 to 8")
        right = len(self.rows_per_head) == orders
        _require(right, "model.memory.rows_per_head", f"needs {orders} values, one per order")
        ascending = self.layers == sorted(set(self.layers)) != []
        _require(ascending, "model.memory.layers", "must name blocks, ascending without repeats")
        _require(self.layers[-1] < model.blocks, "model.memory.layers", "names a block that is not there")
        _require(self.pad_id < model.vocabulary, "model.memory.pad_id", "is outside the vocabulary")
        only = 'chooses a gate, but only the forms "paper" and "v41" have one: leave it out'
        _require(gated or self.gate == "per_stream", "model.memory.gate", only)
        has_gate = gated and self.gate != "none"
        none = "chooses what a gate computes, but this memory has none: leave it out"
        _require(has_gate or self.gate_form == "signed_root", "model.memory.gate_form", none)


AttentionConfig = LatentAttentionConfig | PlainAttentionConfig


@dataclass
class ModelConfig:
    """A language model: backbone, experts and memory."""

    vocabulary: int
    width: int
    blocks: int
    context: int
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_epsilon: float = 1e-6
    tied_head: bool = False
    init: InitConfig = field(default_factory=InitConfig)
    experts: ExpertsConfig | None = None
    hyper_connections: HyperConnectionConfig | None = None
    memory: MemoryConfig | None = None

    @property
    def streams(self) -> int:
        """Residual streams: 1 without hyper-connections."""
        return self.hyper_connections.streams if self.hyper_connections else 1

    @property
    def output_scale(self) -> float:
        """Scale of the weights that write to the residual at the start: each block writes twice."""
        return 1 / math.sqrt(2 * self.blocks) if self.init.output is None else self.init.output

    def check(self) -> None:
        """Refuses what no model could have, by its key."""
        attention = self.attention
        for key in ("vocabulary", "width", "blocks", "context"):
            _require(getattr(self, key) > 0, f"model.{key}", "must be at least 1")
        _require(
            attention.rotary % 2 == 0,
            "model.attention",
            "rotary dimensions come in pairs: take an even width",
        )
        if isinstance(attention, PlainAttentionConfig):
            groups = attention.key_heads or attention.heads
            _require(attention.heads % groups == 0, "model.attention.key_heads", "must divide the heads")
        if attention.yarn:
            stretched = attention.yarn.scale * attention.yarn.original_context
            _require(self.context <= stretched, "model.context", f"is more than YaRN stretches to, {stretched:g}")
            positive = attention.yarn.alpha > 0 or attention.yarn.ramp == "turns"
            _require(positive, "model.attention.yarn.alpha", 'must be above 0 where `ramp` is "index"')
            _require(attention.yarn.beta > attention.yarn.alpha, "model.attention.yarn.beta", "must be above `alpha`")
        for name, deviation in dataclasses.asdict(self.init).items():
            _require(deviation is None or deviation >= 0, f"model.init.{name}", "must be 0 or above")
        if self.experts:
            enough = self.experts.active <= self.experts.routed
            _require(enough, "model.experts.active", f"is more than the {self.experts.routed} routed experts")
            _require(self.experts.first_block < self.blocks, "model.experts.first_block", "is no block")
            _require(self.experts.scaling > 0, "model.experts.scaling", "must be above 0")
            _require(self.experts.sequence_balance >= 0, "model.experts.sequence_balance", "must be 0 or above")
        if self.hyper_connections:
            _require(2 <= self.hyper_connections.streams <= 8, "model.hyper_connections.streams", "must be 2 to 8")
        if self.memory:
            self.memory.check(self)


# --- [text], [data], [train] --------------------------------------------------------------------------------


@dataclass
class TextConfig:
    """The tokens around a text, by their names."""

    end: str | None = None
    begin: dict[str, str] | None = None


@dataclass
class SourceConfig:
    """One of several sources that `engram train` mixes by weight."""

    name: str
    train: Path
    weight: float
    valid: Path | None = None


@dataclass
class DataConfig:
    """Prepared token shards (`engram data prepare`) and the tokenizer that made them; `valid` may be absent.

    Either `train`, or several sources.
    """

    tokenizer: Path
    train: Path | None = None
    valid: Path | None = None
    source: list[SourceConfig] | None = None

    def map_paths(self, change: typing.Callable[[Path], Path]) -> None:
        """Replaces every path by what `change` makes of it."""
        self.tokenizer = change(self.tokenizer)
        self.train = None if self.train is None else change(self.train)
        self.valid = None if self.valid is None else change(self.valid)
        for source in self.source or []:
            source.train = change(source.train)
            source.valid = None if source.valid is None else change(source.valid)

    def check(self) -> None:
        """Refuses data that name no source, or sources in both forms."""
        if not self.source:
            _require(self.train is not None, "data.train", "is missing")
            return
        for key in ("train", "valid"):
            reason = "and `[[data.source]]` exclude each other: move it into a source"
            _require(getattr(self, key) is None, f"data.{key}", reason)
        for index, source in enumerate(self.source):
            reason = f"is {source.weight} for the source {source.name!r}: must be above 0"
            _require(source.weight > 0, f"data.source[{index}].weight", reason)


@dataclass
class Schedule:
    """A linear warm-up, then a course of the rate: "constant", or a table of `step`, `cosine` or `wsd`."""

    decay: Any
    warmup: int = 0

    def rate(self, step: int, total: int) -> float:
        """The share of the peak rate for step `step`, counted from 0, of `total`."""
        step = min(step, total)
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        ((kind, settings),) = self.decay.items()
        if kind == "step":
            passed = (down["factor"] for down in settings if step >= down["after"] * total)
            return float(math.prod(passed))
        floor = float(settings.get("floor", 0.0))
        if kind == "cosine":
            rest = total - self.warmup
            progress = (step - self.warmup) / rest if rest > 0 else 1.0
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        start = (1 - settings["fraction"]) * total
        x = min(max((step - start) / (total - start), 0.0), 1.0)
        fall = 1 - x if settings["shape"] == "linear" else 1 - math.sqrt(x)
        return floor + (1 - floor) * fall

    def check(self) -> None:
        """Refuses a course that is none."""
        if self.decay == "constant":
            return
        keys = {"step": {"after", "factor"}, "cosine": {"floor"}, "wsd": {"fraction", "shape", "floor"}}
        known = isinstance(self.decay, dict) and len(self.decay) == 1 and next(iter(self.decay)) in keys
        _require(known, "train.schedule.decay", 'must be "constant", or one of `step`, `cosine`, `wsd`')
        ((kind, settings),) = self.decay.items()
        for entry in settings if kind == "step" else [settings]:
            for key in entry:
                _require(key in keys[kind], f"train.schedule.decay.{kind}.{key}", "is no key of it")
        if kind == "wsd":
            shape = settings.get("shape") in ("linear", "one_minus_sqrt")
            _require(shape, "train.schedule.decay.wsd.shape", 'must be "linear" or "one_minus_sqrt"')
            fraction = settings.get("fraction", 0)
            _require(0 < fraction <= 1, "train.schedule.decay.wsd.fraction", "must be above 0 and at most 1")


@dataclass
class OptimizerConfig:
    """Muon for the matrices of the blocks, Adam for everything else.

    `muon_heads_apart`: whether Muon orthogonalises the projections of every attention head apart. `weight_decay`: of
    what Muon trains; `adam_weight_decay`: of the embedding, head and other matrices that Adam trains.
    """

    muon_rate: float = 4e-3
    adam_rate: float = 4e-3
    momentum: float = 0.95
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    muon_heads_apart: bool = False
    weight_decay: float = 0.1
    adam_weight_decay: float = 0.0
    clip: float = 1.0


@dataclass
class RowTraining:
    """How memory rows learn."""

    rate_factor: float = 5.0
    optimizer: Literal["adam", "row_wise_adam", "balanced_momentum", "frozen"] = "row_wise_adam"
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    bias_correction: Literal["table", "row"] | None = None
    storage: Literal["ram", "mapped"] = "ram"

    def check(self) -> None:
        """Refuses impossible values, and settings that the optimiser does not have."""
        both, one = '"adam" and "row_wise_adam" have', '"adam" has'
        who = {"beta1": one, "beta2": both, "epsilon": both, "bias_correction": one}
        _require(self.rate_factor > 0, "train.memory.rate_factor", "must be above 0")
        for key, names in who.items():
            has = getattr(self, key) is None or f'"{self.optimizer}"' in names
            other = 'leave it out, or set `optimizer = "adam"`'
            _require(has, f"train.memory.{key}", f"is a setting that only {names}: {other}")
        for key in ("beta1", "beta2"):
            beta = getattr(self, key)
            _require(beta is None or 0 <= beta < 1, f"train.memory.{key}", "must be at least 0 and below 1")
        _require(self.epsilon is None or self.epsilon > 0, "train.memory.epsilon", "must be above 0")


@dataclass
class TrainConfig:
    """How a model learns."""

    steps: int
    batch: int
    schedule: Schedule
    seed: int = 0
    micro_batch: int | None = None
    documents_apart: bool = False
    recompute: bool = False
    skip_limit: int = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    memory: RowTraining = field(default_factory=RowTraining)
    precision: Literal["auto", "f32", "bf16"] = "auto"
    evaluate_every: int = 500
    evaluate_tokens: int | None = None
    checkpoint_every: int = 500
    keep: int = 2

    @property
    def windows_at_once(self) -> int:
        """Sequences that are computed at once."""
        return self.micro_batch or self.batch

    def check(self) -> None:
        """Refuses what cannot be trained, by its key."""
        for key in ("steps", "batch", "micro_batch", "evaluate_every", "evaluate_tokens", "checkpoint_every", "keep"):
            _require(getattr(self, key) != 0, f"train.{key}", "is 0: must be at least 1")
        fits = self.windows_at_once <= self.batch
        reason = f"is more than the batch of {self.batch}: leave it out to compute all at once"
        _require(fits, "train.micro_batch", reason)
        self.schedule.check()
        self.memory.check()


@dataclass
class RunConfig:
    """Everything that decides a run. A checkpoint of a model trained elsewhere has neither data nor training."""

    model: ModelConfig
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig | None = None
    train: TrainConfig | None = None

    def check(self) -> None:
        """Refuses what cannot be trained, by its key."""
        self.model.check()
        if self.data is not None:
            self.data.check()
        if self.train is None:
            return
        self.train.check()
        silent = self.train.memory.optimizer == "frozen" and self.model.memory and self.model.memory.row_init == 0
        reason = 'is "frozen", but `model.memory.row_init` is 0: rows that stay zero say nothing; set a deviation'
        _require(not silent, "train.memory.optimizer", reason)


# --- reading and writing ------------------------------------------------------------------------------------

T = TypeVar("T")


def load_model_config(path: str | PathLike[str]) -> ModelConfig:
    """The `[model]` table of the file at `path`, whatever else it holds."""
    source = Source(path)
    with _located(source):
        model = _read(ModelConfig, _table(source.document, "model"), "model")
        model.check()
    return model


def load_run_config(path: str | PathLike[str]) -> RunConfig:
    """The whole configuration at `path`. Relative paths in it start at the file's own folder."""
    source = Source(path)
    with _located(source):
        _translate_accumulation(source.document)
        run = _read(RunConfig, source.document, "")
        run.check()
    if run.data:
        run.data.map_paths(lambda data: Path(path).parent / data)
    return run


def load_table(kind: type[T], path: str | PathLike[str]) -> T:
    """The dataclass `kind` from the file at `path`: every key known, none missing, each of its type."""
    source = Source(path)
    with _located(source):
        return _read(kind, source.document, "")


def to_toml(run: RunConfig) -> str:
    """The configuration as TOML, with every key that differs from nothing."""
    return toml_file.to_toml(_plain(run))


class _Refused(Exception):
    """Why a configuration cannot be used, and the key."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


@contextlib.contextmanager
def _located(source: Source) -> Iterator[None]:
    """Puts the file that states a key to what is wrong with it."""
    try:
        yield
    except _Refused as refused:
        raise source.error(refused.key, str(refused)) from None


def _require(right: bool | None, key: str, reason: str) -> None:
    if not right:
        raise _Refused(key, f"`{key}`: {reason}")


def _translate_accumulation(document: dict[str, Any]) -> None:
    """Says in `train.micro_batch` what the old key `train.accumulation` says."""
    train = document.get("train")
    parts = train.get("accumulation") if isinstance(train, dict) else None
    batch = train.get("batch") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(parts, int) or not isinstance(batch, int):
        return
    key = "train.accumulation"
    reason = "is the old form of `micro_batch`, which is given too: leave it out"
    _require("micro_batch" not in train, key, reason)
    most = max(batch, 1)
    reason = (
        f"is {parts}, but a batch of {most} has 1 to {most} micro-batches; write `micro_batch`, the number of "
        "sequences computed at once"
    )
    _require(1 <= parts <= most, key, reason)
    del train["accumulation"]
    if parts > 1:
        train["micro_batch"] = -(-batch // parts)


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key)
    if not isinstance(table, dict):
        raise _Refused(key, f"there is no table [{key}]")
    return table


def _read(kind: type[T], table: dict[str, Any], key: str) -> T:
    """The dataclass `kind` from a table: every key known, none missing, each of its type."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    for name in table:
        if name not in fields:
            known = ", ".join(fields)
            wrong = _join(key, name)
            raise _Refused(wrong, f"`{wrong}` is no key that is known here; the keys are {known}")
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], _join(key, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Refused(_join(key, name), f"`{_join(key, name)}` is missing")
    return kind(**values)


def _value(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return _expect(value in arguments, value, key, " or ".join(map(repr, arguments)))
    if origin in (typing.Union, types.UnionType):
        return _alternative([a for a in arguments if a is not type(None)], value, key)
    if origin is list:
        _expect(isinstance(value, list), value, key, "a list")
        return [_value(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return _expect(isinstance(value, dict), value, key, "a table")
    if dataclasses.is_dataclass(hint):
        _expect(isinstance(value, dict), value, key, "a table")
        return _read(typing.cast(type, hint), value, key)
    if hint is bool:
        return _expect(isinstance(value, bool), value, key, "true or false")
    if hint is int:
        natural = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return _expect(natural, value, key, "an integer that is not negative")
    if hint is float:
        _expect(isinstance(value, int | float) and not isinstance(value, bool), value, key, "a number")
        _expect(math.isfinite(value), value, key, "finite")
        return float(value)
    _expect(isinstance(value, str), value, key, "a text")
    return Path(value) if hint is Path else value


def _alternative(kinds: list[Any], value: Any, key: str) -> Any:
    """A value of one of several types: of tables, the one whose `kind` it names."""
    if len(kinds) == 1:
        return _value(kinds[0], value, key)
    _expect(isinstance(value, dict), value, key, "a table")
    named = {typing.get_args(typing.get_type_hints(kind)["kind"])[0]: kind for kind in kinds}
    found = named.get(value.get("kind"))
    if found is None:
        names = " or ".join(map(repr, named))
        raise _Refused(f"{key}.kind", f"`{key}.kind` is {value.get('kind')!r}, but must be {names}")
    return _read(found, value, key)


def _expect(right: bool, value: Any, key: str, needed: str) -> Any:
    if not right:
        raise _Refused(key, f"`{key}` is {value!r}, but must be {needed}")
    return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _plain(value: Any) -> Any:
    """Dataclasses as tables without what is absent."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, _plain(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {name: item for name, item in pairs if item is not None and item != {}}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
