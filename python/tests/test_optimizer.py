"""The optimisers against twenty steps of PyTorch's Muon, Adam and SparseAdam, on every weight of two small models.

`crates/train/tests/golden/trajectories.py` says by hand which optimiser trains what, and wrote the values; the Rust
optimiser is held against the same.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from repository import REPOSITORY

pytest.importorskip("torch")

import torch

from engram_lm import optimizers
from engram_lm.config import OptimizerConfig, RowTraining, load_model_config
from engram_lm.torch import LanguageModel, Optimizer, RowTable
from engram_lm.torch.rows import Where
from engram_lm.torch.training import Matrices, of_heads, training_plan

PAPER = """
[model]
vocabulary = 11
width = 8
blocks = 2
context = 4
feed_forward = { width = 7 }
experts = { first_block = 1, routed = 3, active = 1, width = 5, shared_width = 4 }
hyper_connections = { streams = 2 }
memory = { layers = [0], max_order = 3, heads = 2, row_width = 3, rows_per_head = [5, 5] }

[model.attention]
kind = "latent"
heads = 2
query_rank = 6
latent_rank = 5
content_width = 3
rotary_width = 2
value_width = 4
"""
HEADS_APART = """
[model]
vocabulary = 11
width = 8
blocks = 1
context = 4
tied_head = true
attention = { kind = "plain", heads = 4, key_heads = 2, head_width = 4 }
feed_forward = { width = 7 }
memory = { form = "v41", layers = [0], max_order = 3, heads = 2, row_width = 3, rows_per_head = [5, 5] }
"""
BASE = OptimizerConfig(muon_rate=0.02, adam_rate=0.01)
APART = dataclasses.replace(BASE, muon_heads_apart=True, adam_weight_decay=0.1)


@cache
def golden() -> Any:
    return json.loads((REPOSITORY / "crates/train/tests/golden/trajectories.json").read_text())


def unit(weight: int, step: int, place: int) -> float:
    """A number in [-1, 1) for a place of a weight (or row) at a step, as the script has it."""
    x = (weight * 1_000_003 + step * 7919 + place * 104_729 + 12_345) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) >> 16) / 32768 - 1


@cache
def values(weight: int, step: int, count: int) -> torch.Tensor:
    return torch.tensor([unit(weight, step, place) for place in range(count)])


def scale(step: int) -> float:
    return float(2.0 ** ((step * 3) % 7 - 7))


def deviation(text: str, config: OptimizerConfig, name: str, folder: Path) -> str | None:
    """Steps from the script's start by its gradients; gives the first value that is not PyTorch's."""
    path = folder / "model.toml"
    path.write_text(text)
    model = LanguageModel(load_model_config(path))
    weights = dict(sorted(model.named_parameters()))
    shapes = golden()[name]["shapes"]
    assert {key: list(weight.shape) for key, weight in weights.items()} == shapes
    with torch.no_grad():
        for index, weight in enumerate(weights.values()):
            weight.copy_(0.5 * values(index, 0, weight.numel()).view_as(weight))
    optimizer = Optimizer(model, config)
    for step, expected in enumerate(golden()[name]["steps"], 1):
        for index, weight in enumerate(weights.values()):
            weight.grad = scale(step) * values(index, step, weight.numel()).view_as(weight)
        optimizer.step(1 - step / 32)
        for key, wanted in expected.items():
            flat = weights[key].detach().flatten()
            for j, want in enumerate(wanted):
                place = (j * len(flat) // len(wanted) + step) % len(flat)
                if not abs(flat[place].item() - want) < 2e-5:
                    return f"step {step}, `{key}`[{place}]: {flat[place]}, but PyTorch has {want}"
    return None


def test_every_weight_of_the_papers_model_follows_pytorch(tmp_path: Path) -> None:
    assert deviation(PAPER, BASE, "paper", tmp_path) is None


def test_every_weight_follows_pytorch_with_heads_apart_and_decay_by_adam(tmp_path: Path) -> None:
    assert deviation(HEADS_APART, APART, "heads_apart", tmp_path) is None
    together = dataclasses.replace(APART, muon_heads_apart=False)
    assert deviation(HEADS_APART, together, "heads_apart", tmp_path) is not None


OTHERS: list[dict[str, Any]] = [
    {"momentum": 0.9},
    {"weight_decay": 0.0},
    {"clip": 1e9},
    {"muon_rate": 0.021},
    {"adam_rate": 0.0105},
    {"betas": [0.89, 0.95]},
    {"betas": [0.9, 0.96]},
    {"epsilon": 1e-3},
    {"adam_weight_decay": 0.1},
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: "-".join(map(str, other)))
def test_another_setting_deviates(other: dict[str, Any], tmp_path: Path) -> None:
    assert deviation(PAPER, dataclasses.replace(BASE, **other), "paper", tmp_path) is not None


def row_deviation(training: RowTraining, name: str, where: Where) -> str | None:
    """Teaches rows as the script does; gives the first value that is not PyTorch's."""
    table = RowTable.create(3, 9, where=where, optimizer=optimizers.configured(training))
    for step, expected in enumerate(golden()["rows"][name], 1):
        grads = [[unit(row, step, 1 + column) * scale(step) for column in range(3)] for row in expected["ids"]]
        ids = torch.tensor(expected["ids"], dtype=torch.int64)
        table.learn(ids, torch.tensor(grads).view(len(ids), 3), 0.05)
        error = (table.read(torch.arange(9)).flatten() - torch.tensor(expected["rows"])).abs().max()
        if not error < 5e-6:
            return f"step {step}: {error}"
    return None


ROWS = {
    "adam": RowTraining(optimizer="adam"),
    "adam_by_row": RowTraining(optimizer="adam", bias_correction="row"),
    "row_wise_adam": RowTraining(optimizer="row_wise_adam"),
}


@pytest.mark.parametrize("where", ["store", "device"])
def test_rows_follow_pytorch(where: Where) -> None:
    for name, training in ROWS.items():
        assert row_deviation(training, name, where) is None, name
        for key, value in (("beta1", 0.89), ("beta2", 0.99), ("epsilon", 1e-3)):
            if name == "row_wise_adam" and key == "beta1":
                continue
            changes: dict[str, Any] = {key: value}
            other = dataclasses.replace(training, **changes)
            assert row_deviation(other, name, where) is not None, (name, key)
    assert row_deviation(ROWS["adam"], "adam_by_row", where) is not None
    assert row_deviation(RowTraining(optimizer="adam", bias_correction="table"), "adam", where) is None


def test_keys_and_values_of_all_heads_are_a_matrix_each() -> None:
    # One row: k0 k0 v0 k1 k1 v1.
    row = torch.arange(6.0).view(1, 6)
    matrices = of_heads(2, 2, 1)
    together, apart = matrices.split(row, False), matrices.split(row, True)
    assert [part.flatten().tolist() for part in together] == [[0, 1, 3, 4], [2, 5]]
    assert [list(part.shape) for part in together] == [[1, 1, 4], [1, 1, 2]]
    assert [list(part.shape) for part in apart] == [[2, 1, 2], [2, 1, 1]]
    (stacked,) = Matrices((3,), stacked=2).split(torch.arange(12.0).view(4, 3), False)
    assert list(stacked.shape) == [2, 2, 3]
    for shape, of in (((3, 5, 12), of_heads(3, 1, 3)), ((4, 12), Matrices((5, 7))), ((6, 12), Matrices((12,), 1, 3))):
        weight = torch.randn(shape)
        for heads_apart in (False, True):
            assert torch.equal(of.join(of.split(weight, heads_apart), weight, heads_apart), weight)
    with pytest.raises(ValueError, match="does not hold the matrices"):
        matrices.split(torch.zeros(2, 7), False)


def test_a_weight_that_no_module_declares_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no module declares how `0\.weight` is trained"):
        training_plan(model)
