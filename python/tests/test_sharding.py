"""Weights sharded among processes by PyTorch's FSDP2, rows among their owners: the steps of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpus import write_run

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from engram_lm import optimizers
from engram_lm._addressing import of_memory
from engram_lm.config import load_model_config
from engram_lm.torch import LanguageModel
from engram_lm.torch.first_weights import initialise
from engram_lm.torch.group import Group
from engram_lm.torch.owners import OwnedTable
from engram_lm.torch.rows import Fetched

STEPS, BATCH = 8, 4


def train(config: Path, out: Path) -> None:
    """Some steps by Adam on what this process has of every batch. Writes the losses and the first step's gradients."""
    torch.set_num_threads(1)
    group = Group(timeout=120)
    model_config = load_model_config(config)
    assert model_config.memory is not None
    model = LanguageModel(model_config).train()
    initialise(model, 0)
    count = sum(p.numel() for p in model.parameters())
    if group.size > 1:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)) < 0.6 * count
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    addressing = of_memory(model_config.memory, config.parent / "tokenizer.json")
    tables = {
        layer: OwnedTable.create(
            group,
            model_config.memory.row_width,
            addressing.layer(layer),
            optimizers.RowWiseAdam(),
            "store",
            0.02,
            layer,
            None,
        )
        for layer in model_config.memory.layers
    }
    random, losses = torch.Generator().manual_seed(1), []
    gradients: dict[str, list[float]] = {}
    mine = slice(group.rank * BATCH // group.size, (group.rank + 1) * BATCH // group.size)
    for _ in range(STEPS):
        windows = torch.randint(2, 12, (BATCH, model_config.context + 1), generator=random)[mine]
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        fetched = {}
        for layer, table in tables.items():
            ids = torch.empty(*tokens.shape, addressing.layer(layer).slots, dtype=torch.int64)
            fetched[layer] = table.fetch([addressing.layer(layer).row_ids(tokens, out=ids)])
        loss = model(tokens, targets, {layer: rows[0].embed() for layer, rows in fetched.items()})
        loss.backward()
        # FSDP2 takes the mean of weights' gradients over the processes; rows' are sums of what each one gives.
        for part in (rows[0] for rows in fetched.values()):
            assert part.rows.grad is not None
            part.rows.grad /= group.size
        losses.append(float(group.sum(loss.detach().clone())) / group.size)
        if not gradients:
            gradients = gradients_of(model) | gradients_of_rows(tables, fetched, group)
        optimizer.step()
        optimizer.zero_grad()
        for layer, table in tables.items():
            table.update(fetched[layer], 5e-2)
    if group.rank == 0:
        out.write_text(json.dumps({"losses": losses, "gradients": gradients}))
    if dist.is_initialized():
        dist.barrier()
    group.leave()


def gradients_of(model: torch.nn.Module) -> dict[str, list[float]]:
    """Of every weight, whole; all processes call it together."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        found[name] = whole.flatten().tolist()
    return found


def gradients_of_rows(
    tables: dict[int, OwnedTable], fetched: dict[int, list[Fetched]], group: Group
) -> dict[str, list[float]]:
    """Of every table, the whole of it; all processes call it together."""
    found = {}
    for layer, table in tables.items():
        dense = torch.zeros(table.rows, table.table.width)
        for part in fetched[layer]:
            dense.index_add_(0, part.ids, part.grads)
        found[f"rows {layer}"] = group.sum(dense).flatten().tolist()
    return found


def test_fully_sharded_weights_and_owned_rows_take_the_steps_of_one_process(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    found = []
    for processes in (1, 2):
        out = tmp_path / f"on{processes}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "/dev/null"}
        command += [__file__, str(config), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    alone, sharded = found
    assert alone["losses"][-1] < alone["losses"][0] - 0.3, alone["losses"]
    assert np.abs(np.subtract(alone["losses"], sharded["losses"])).max() < 1e-4
    assert alone["gradients"].keys() == sharded["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        # A convolution of zeros gives its norm no gradient.
        assert np.any(gradient) or name.endswith("convolution.norm"), name
        assert np.allclose(sharded["gradients"][name], gradient, rtol=1e-4, atol=1e-5), name


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
