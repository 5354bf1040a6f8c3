"""Memory for models of the `transformers` library: `attach` puts it before chosen blocks, `detach` takes it off.

    memory = attach(model, MemoryConfig(layers=[2, 14], max_order=3, heads=8, row_width=32,
                                        rows_per_head=[50_000, 50_000], form="v41"), tokenizer="tokenizer.json")
    ...                                # train with plain PyTorch; after each optimiser step:
    memory.step(rate=2e-3)             # teaches the rows; with `Trainer`, pass `callbacks=[RowCallback(memory, 2e-3)]`
    memory.save("adapter")
    detach(model)

At first a memory says nothing: the value's projection is zero, and the model computes what it did before, bit for bit.

What `engram graft` and `engram teach` wrote is attached likewise:

    attach(model, "manuals.adapter", tokenizer="tokenizer.json", overlays=["facts"])
"""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram_lm import adapter, optimizers, table_file
from engram_lm._addressing import of_memory
from engram_lm._core import Addressing, Table
from engram_lm.config import MemoryConfig
from engram_lm.optimizers import RowOptimizer
from engram_lm.torch.memory import Memory
from engram_lm.torch.rows import ReadRows, RowTable, Where, write_fresh

_ATTRIBUTE = "engram_memory"
FORMAT = 1


class AttachedMemory(nn.Module):
    """A memory that stands before some blocks of a model. Made by `attach`."""

    def __init__(self, config: MemoryConfig, width: int, addressing: Addressing, tables: dict[int, RowTable]) -> None:
        super().__init__()
        self.config, self.width, self.addressing = config, width, addressing
        self.modules_of = nn.ModuleDict({str(layer): Memory(config, 1, width) for layer in config.layers})
        self.tables = nn.ModuleDict({str(layer): table for layer, table in tables.items()})
        # What this forward pass reads: ids [B, T, slots] by layer, and positions without memory.
        self._ids: dict[int, Tensor] = {}
        self._dead: Tensor | None = None
        # Tokens that the key-value cache has seen, [B, t]: n-grams reach back into them.
        self._seen: np.ndarray[Any, np.dtype[np.int64]] | None = None
        self._seen_dead: np.ndarray[Any, np.dtype[np.bool_]] | None = None
        self._hooks: list[Any] = []
        # What it was read from, if `engram` wrote that: it is saved in the same form.
        self._adapter: adapter.Adapter | None = None
        with torch.no_grad():
            for module in self.modules_of.values():
                assert isinstance(module, Memory)
                _silence(module)

    def step(self, rate: float) -> None:
        """Teaches the rows by the gradients that `backward` has brought back since the last step."""
        for table in self.tables.values():
            assert isinstance(table, RowTable)
            table.step(rate)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an adapter: `adapter.json`, `memory.safetensors`, a table for each layer.

        A memory that `engram graft` or `engram teach` wrote is written as they do, with `adapter.toml`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        made = self._adapter
        name_of = _plain_name if made is None else _checkpoint_name
        weights = {name_of(n): w.detach().float().contiguous().cpu() for n, w in self.modules_of.state_dict().items()}
        save_file(weights, folder / adapter.WEIGHTS)
        for layer, table in self.tables.items():
            assert isinstance(table, RowTable)
            table.save(folder / f"memory.layer{layer}.table")
        if made is not None:
            (folder / adapter.ABOUT).write_text(adapter.text_of_tables(made))
            return
        classes = np.asarray(self.addressing.vocabulary_classes()).tolist()
        about = {"format": FORMAT, "width": self.width, "memory": asdict(self.config), "classes": classes}
        (folder / "adapter.json").write_text(json.dumps(about))

    # --- the forward pass ------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the model runs: which rows its tokens read."""
        tokens = named.get("input_ids", arguments[0] if arguments else None)
        if not isinstance(tokens, Tensor):
            raise ValueError("a memory needs `input_ids`: embeddings alone do not say which rows to read")
        cached = _cached_tokens(named)
        ids = tokens.detach().cpu().numpy().astype(np.int64)
        dead = _dead(named.get("attention_mask"), ids.shape, cached)
        if cached:
            ids, dead = self._behind(cached, ids, dead)
            if any(module.convolution is not None for module in self._memories()):
                raise ValueError("a memory with a convolution decodes without a cache only: pass `use_cache=False`")
        self._seen, self._seen_dead = ids, dead
        new = tokens.shape[1]
        for layer in self.config.layers:
            found = np.asarray(self.addressing.layer(layer).row_ids(ids, dead=dead))[:, -new:]
            self._ids[layer] = torch.from_numpy(np.ascontiguousarray(found))
        self._dead = torch.from_numpy(dead[:, -new:].copy()).to(tokens.device) if dead[:, -new:].any() else None

    def _behind(self, cached: int, ids: Any, dead: Any) -> tuple[Any, Any]:
        """The tokens behind those that the cache has seen."""
        seen, seen_dead = self._seen, self._seen_dead
        if seen is None or seen_dead is None or seen.shape[0] != ids.shape[0] or seen.shape[1] < cached:
            raise ValueError(
                f"the cache holds {cached} tokens of {len(ids)} sequences, which this memory has not seen: begin with "
                "an empty cache, and without beams"
            )
        return np.concatenate([seen[:, :cached], ids], 1), np.concatenate([seen_dead[:, :cached], dead], 1)

    def _before_block(self, layer: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Adds the memory of `layer` to a block's hidden states."""
        hidden: Tensor = named["hidden_states"] if "hidden_states" in named else arguments[0]
        table, module = self.tables[str(layer)], self.modules_of[str(layer)]
        e = table(self._ids[layer]).flatten(-2).to(hidden.device)
        added = module(hidden.unsqueeze(-2), e, self._dead).squeeze(-2)
        hidden = hidden + added.to(hidden.dtype)
        if "hidden_states" in named:
            return arguments, {**named, "hidden_states": hidden}
        return (hidden, *arguments[1:]), named

    def _memories(self) -> list[Memory]:
        return [module for module in self.modules_of.values() if isinstance(module, Memory)]


def attach(
    model: nn.Module,
    memory: MemoryConfig | str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    overlays: Sequence[str | os.PathLike[str]] = (),
    where: Where = "store",
    optimizer: RowOptimizer | str | None = None,
    seed: int = 0,
    freeze: bool = True,
) -> AttachedMemory:
    """Puts a memory before the blocks `memory.layers` of `model` (Llama, Qwen, Gemma, Mistral types).

    `memory`: a new one's configuration, with the `tokenizer` whose ids the model takes (path of a tokenizer.json); or
    the folder of an adapter that `AttachedMemory.save` wrote; or, with the `tokenizer`, that of an adapter by `engram
    graft`, or of an overlay by `engram teach`, with `overlays` on top, the lowest first.
    `where`: rows in our store, in host memory, or on the model's device. `optimizer`: how rows learn; none: Adam for a
    new memory, as it was for one that was saved with its optimiser's state. Where there is no such state, rows are only
    read; name an optimiser, and it begins with an empty one.
    `freeze`: whether the model's own weights stop learning. `seed`: of the rows, whose deviation is `memory.row_init`,
    or 0.02 where that is 0: rows of zeros behind a projection of zeros would learn nothing.

    Raises `ValueError` if the model has no blocks that are known, has a memory already, or has fewer blocks;
    `AddressMismatch` if an adapter or overlay was made for another tokenizer or another memory.
    """
    if hasattr(model, _ATTRIBUTE):
        raise ValueError("this model has a memory already: `detach` it first")
    base, blocks = _blocks(model)
    device = next(model.parameters()).device
    chosen = optimizers.named(optimizer) if isinstance(optimizer, str) else optimizer
    rows = _Rows(where, device, chosen)
    if isinstance(memory, MemoryConfig):
        _refuse_overlays(overlays)
        attached = _new(memory, _width(model), tokenizer, rows, seed)
    elif adapter.is_at(Path(memory)):
        attached = _grafted(adapter.load(Path(memory), _needed(tokenizer), overlays), _width(model), rows)
    else:
        _refuse_overlays(overlays)
        attached = _saved(Path(memory), rows)
    wrong = [layer for layer in attached.config.layers if layer >= len(blocks)]
    if wrong or attached.width != _width(model):
        raise ValueError(
            f"the memory is for blocks {attached.config.layers} of width {attached.width}, but the model has "
            f"{len(blocks)} blocks of width {_width(model)}"
        )
    if freeze:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    setattr(model, _ATTRIBUTE, attached.to(device))
    hooks = [base.register_forward_pre_hook(attached._begin, with_kwargs=True)]
    for layer in attached.config.layers:

        def before(module: nn.Module, arguments: Any, named: Any, layer: int = layer) -> Any:
            return attached._before_block(layer, arguments, named)

        hooks.append(blocks[layer].register_forward_pre_hook(before, with_kwargs=True))
    attached._hooks = hooks
    return attached


def detach(model: nn.Module) -> AttachedMemory:
    """Takes the memory off `model`, which then computes what it did before `attach`. Gives the memory.

    Weights stay frozen or not, as they are. Raises `ValueError` if there is no memory.
    """
    attached = getattr(model, _ATTRIBUTE, None)
    if not isinstance(attached, AttachedMemory):
        raise ValueError("this model has no memory")
    for hook in attached._hooks:
        hook.remove()
    delattr(model, _ATTRIBUTE)
    return attached


class RowCallback:
    """A callback of `transformers.Trainer` that teaches the rows after each optimiser step.

    `rate`: the learning rate of the rows, as a multiple of the optimiser's current one; the paper takes 5.
    """

    def __new__(cls, memory: AttachedMemory, factor: float = 5.0) -> Any:
        """Made when it is needed: only here is `transformers` imported."""
        from transformers import TrainerCallback

        class Callback(TrainerCallback):  # type: ignore[misc, unused-ignore]
            """Teaches the rows."""

            def on_optimizer_step(self, args: Any, state: Any, control: Any, **named: Any) -> None:
                """After the weights' step, before the schedule moves on."""
                memory.step(factor * named["optimizer"].param_groups[0]["lr"])

        return Callback()


@dataclass(frozen=True)
class _Rows:
    """Where rows are to be, and how they are to learn; no optimiser: as they did."""

    where: Where
    device: torch.device
    optimizer: RowOptimizer | None

    def of_adapter(self, made: adapter.Adapter, layer: int) -> RowTable:
        """Rows that `engram` wrote, or `AttachedMemory.save` in its form."""
        trained = made.trained_table(layer)
        return (
            self._of_table(made.table(layer))
            if trained is None
            else self.of_file(trained, made.addressing.layer(layer))
        )

    def _of_table(self, table: Table) -> RowTable:
        """Rows that have no optimiser state."""
        if self.optimizer is None and self.where == "store":
            return ReadRows(table, self.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.table"
            write_fresh(table, self.optimizer or optimizers.Frozen(), path)
            return RowTable.open(path, where=self.where, device=self.device)

    def of_file(self, path: Path, addressing: Addressing) -> RowTable:
        """Rows of a table file that has the state of an optimiser."""
        found = table_file.read_header(path).optimizer
        if self.optimizer not in (None, found):
            raise ValueError(f"{path}: its rows learn by {found}, not by {self.optimizer}: leave `optimizer` out")
        return RowTable.open(path, where=self.where, device=self.device, addressing=addressing)


def _new(
    config: MemoryConfig, width: int, tokenizer: str | os.PathLike[str] | None, rows: _Rows, seed: int
) -> AttachedMemory:
    _check_form(config)
    addressing = of_memory(config, _needed(tokenizer))
    tables = {
        layer: RowTable.create(
            config.row_width,
            addressing=addressing.layer(layer),
            where=rows.where,
            device=rows.device,
            optimizer=rows.optimizer or "adam",
            deviation=config.row_init or 0.02,
            seed=seed + layer,
        )
        for layer in config.layers
    }
    return AttachedMemory(config, width, addressing, tables)


def _saved(folder: Path, rows: _Rows) -> AttachedMemory:
    """The memory that `AttachedMemory.save` wrote."""
    about = json.loads((folder / "adapter.json").read_text())
    if about["format"] != FORMAT:
        raise ValueError(f"{folder}: its format is {about['format']}, this program reads {FORMAT}")
    config = MemoryConfig(**about["memory"])
    addressing = of_memory(config, None, np.array(about["classes"]))
    tables = {
        layer: rows.of_file(folder / f"memory.layer{layer}.table", addressing.layer(layer)) for layer in config.layers
    }
    attached = AttachedMemory(config, about["width"], addressing, tables)
    attached.modules_of.load_state_dict(load_file(folder / adapter.WEIGHTS))
    return attached


def _grafted(made: adapter.Adapter, width: int, rows: _Rows) -> AttachedMemory:
    """The memory that `engram` wrote."""
    config = made.about.memory
    _check_form(config)
    tables = {layer: rows.of_adapter(made, layer) for layer in config.layers}
    attached = AttachedMemory(config, width, made.addressing, tables)
    attached._adapter = made
    expected = {_checkpoint_name(name): weight for name, weight in attached.modules_of.state_dict().items()}
    found = load_file(made.weights)
    for name in found.keys() ^ expected.keys():
        raise ValueError(f"{made.weights}: `{name}` is {'missing' if name in expected else 'no weight of this memory'}")
    for name, weight in expected.items():
        if weight.shape != found[name].shape:
            shapes = f"{list(found[name].shape)}, but in this model must have {list(weight.shape)}"
            raise ValueError(f"{made.weights}: `{name}` has the shape {shapes}")
        weight.copy_(found[name])
    return attached


def _needed(tokenizer: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if tokenizer is None:
        raise ValueError("this memory needs `tokenizer`, the path of the tokenizer.json whose ids the model takes")
    return tokenizer


def _refuse_overlays(overlays: Sequence[str | os.PathLike[str]]) -> None:
    if overlays:
        raise ValueError("`overlays` lie on the memory of `engram graft` or `engram teach`, and this is another")


def _check_form(config: MemoryConfig) -> None:
    if config.form not in ("paper", "v41") or config.gate == "shared":
        raise ValueError('a memory before one residual stream has the form "paper" or "v41" and a gate of its own')


def _plain_name(name: str) -> str:
    return name


def _checkpoint_name(name: str) -> str:
    """`L.X` as `blocks.L.memory.X`."""
    layer, _, rest = name.partition(".")
    return f"blocks.{layer}.memory.{rest}"


def _silence(module: Memory) -> None:
    """The value's projection becomes zero."""
    if isinstance(module.projection, nn.Parameter):
        module.projection[:, module.gates * module.width :] = 0.0
    else:
        module.projection.get_parameter("value").zero_()


def _blocks(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The part that takes token ids, and its blocks."""
    for path in ("model", "model.language_model", "language_model.model", ""):
        try:
            base = model.get_submodule(path)
        except AttributeError:
            continue
        blocks = getattr(base, "layers", None)
        if isinstance(blocks, nn.ModuleList):
            return base, blocks
    raise ValueError(
        f"a {type(model).__name__} has no `model.layers`: models of Llama's, Qwen's, Gemma's, Mistral's type do"
    )


def _width(model: nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config, "text_config", config).hidden_size)


def _cached_tokens(named: dict[str, Any]) -> int:
    """Tokens that the key-value cache holds, under whichever name it is passed."""
    caches = [named[name] for name in ("past_key_values", "cache", "cache_params") if named.get(name) is not None]
    return int(caches[0].get_seq_length()) if caches else 0


def _dead(mask: Any, shape: tuple[int, int], cached: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Positions of these tokens that are padding by an attention mask [B, cached + T]."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return np.zeros(shape, bool)
    if mask.shape[1] != cached + shape[1]:
        raise ValueError(
            f"the attention mask is for {mask.shape[1]} tokens, but {shape[1]} are given behind {cached} in the cache: "
            "a memory must see every token, in one cache"
        )
    found: np.ndarray[Any, np.dtype[np.bool_]] = mask[:, -shape[1] :].detach().cpu().numpy() == 0
    return found
