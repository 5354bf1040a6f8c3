"""Memory for models of the `transformers` library: `attach` puts it before chosen blocks, `detach` takes it off.

    memory = attach(model, MemoryConfig(layers=[2, 14], max_order=3, heads=8, row_width=32,
                                        rows_per_head=[50_000, 50_000], form="v41"), tokenizer="tokenizer.json")
    ...                                # train with plain PyTorch; after each optimiser step:
    memory.step(rate=2e-3)             # teaches the rows; with `Trainer`, pass `callbacks=[RowCallback(memory, 2e-3)]`
    memory.save("adapter")
    detach(model)

At first a memory says nothing: the value's projection is zero, and the model computes what it did before, bit for bit.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engram_lm import optimizers
from engram_lm._addressing import of_memory
from engram_lm._core import Addressing
from engram_lm.config import MemoryConfig
from engram_lm.optimizers import RowOptimizer
from engram_lm.torch.memory import Memory
from engram_lm.torch.rows import RowTable, Where

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
        """Writes an adapter: `adapter.json`, `memory.safetensors`, a table for each layer."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: w.detach().float().contiguous().cpu() for name, w in self.modules_of.state_dict().items()}
        save_file(weights, folder / "memory.safetensors")
        for layer, table in self.tables.items():
            assert isinstance(table, RowTable)
            table.save(folder / f"memory.layer{layer}.table")
        classes = np.asarray(self.addressing.vocabulary_classes()).tolist()
        adapter = {"format": FORMAT, "width": self.width, "memory": asdict(self.config), "classes": classes}
        (folder / "adapter.json").write_text(json.dumps(adapter))

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
    where: Where = "store",
    optimizer: RowOptimizer | str = "adam",
    seed: int = 0,
    freeze: bool = True,
) -> AttachedMemory:
    """Puts a memory before the blocks `memory.layers` of `model` (Llama, Qwen, Gemma, Mistral types).

    `memory`: a new one's configuration, with the `tokenizer` whose ids the model takes (path of a tokenizer.json); or
    the folder of an adapter that `AttachedMemory.save` wrote.
    `where`: rows in our store, in host memory, or on the model's device. `freeze`: whether the model's own weights stop
    learning. `seed`: of the rows, whose deviation is `memory.row_init`, or 0.02 where that is 0: rows of zeros behind a
    projection of zeros would learn nothing.

    Raises `ValueError` if the model has no blocks that are known, has a memory already, or has fewer blocks.
    """
    if hasattr(model, _ATTRIBUTE):
        raise ValueError("this model has a memory already: `detach` it first")
    base, blocks = _blocks(model)
    device = next(model.parameters()).device
    if isinstance(memory, MemoryConfig):
        attached = _new(memory, _width(model), tokenizer, where, device, optimizer, seed)
    else:
        attached = _adapter(Path(memory), where, device)
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


def _new(
    config: MemoryConfig,
    width: int,
    tokenizer: str | os.PathLike[str] | None,
    where: Where,
    device: torch.device,
    optimizer: RowOptimizer | str,
    seed: int,
) -> AttachedMemory:
    if tokenizer is None:
        raise ValueError("a new memory needs `tokenizer`, the path of the tokenizer.json whose ids the model takes")
    if config.form not in ("paper", "v41") or config.gate == "shared":
        raise ValueError('a memory before one residual stream has the form "paper" or "v41" and a gate of its own')
    addressing = of_memory(config, tokenizer)
    chosen = optimizers.named(optimizer) if isinstance(optimizer, str) else optimizer
    tables = {
        layer: RowTable.create(
            config.row_width,
            addressing=addressing.layer(layer),
            where=where,
            device=device,
            optimizer=chosen,
            deviation=config.row_init or 0.02,
            seed=seed + layer,
        )
        for layer in config.layers
    }
    return AttachedMemory(config, width, addressing, tables)


def _adapter(folder: Path, where: Where, device: torch.device) -> AttachedMemory:
    adapter = json.loads((folder / "adapter.json").read_text())
    if adapter["format"] != FORMAT:
        raise ValueError(f"{folder}: its format is {adapter['format']}, this program reads {FORMAT}")
    config = MemoryConfig(**adapter["memory"])
    addressing = of_memory(config, None, np.array(adapter["classes"]))
    tables = {}
    for layer in config.layers:
        path, chosen = folder / f"memory.layer{layer}.table", addressing.layer(layer)
        tables[layer] = RowTable.open(path, where=where, device=device, addressing=chosen)
    attached = AttachedMemory(config, adapter["width"], addressing, tables)
    attached.modules_of.load_state_dict(load_file(folder / "memory.safetensors"))
    return attached


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
