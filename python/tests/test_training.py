"""Training alone and among processes: runs resume bit for bit, and results do not depend on the number of processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus import write_run

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch

from engram_lm import Table
from engram_lm.config import load_run_config
from engram_lm.data import Sampler, TokenShards, positions_of, stretches
from engram_lm.torch.checkpoint import Checkpoint
from engram_lm.torch.group import TreeSum, tree_sum
from engram_lm.torch.model import Experts
from engram_lm.torch.owners import SHARDS, Shares
from engram_lm.torch.trainer import parts_of
from engram_lm.train import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": "/dev/null"}


def metrics(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> np.ndarray:
    return np.array([line["loss"] for line in metrics(folder)])


def rows_of(folder: Path) -> list[np.ndarray]:
    checkpoint = Checkpoint(folder)
    assert checkpoint.run.model.memory is not None
    paths = [checkpoint.folder / f"memory.layer{layer}.table" for layer in checkpoint.run.model.memory.layers]
    tables = [Table.open(path, tier="ram") for path in paths]
    return [np.asarray(table.gather(np.arange(table.rows))) for table in tables]


def differ_by_rounding(one: Path, other: Path) -> None:
    """Losses agree at first; later, choices of experts and first steps of rows make something of rounding."""
    difference = np.abs(losses(one) - losses(other))
    assert difference[:4].max() < 1e-5 and difference.max() < 1e-2, difference


def same_bytes(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name not in ("run.toml", "manifest.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    torch.set_num_threads(1)
    assert main([str(config), "--out", str(tmp_path / "whole")]) == 0
    found = losses(tmp_path / "whole")
    assert len(found) == 12 and found[-3:].mean() < found[:3].mean() - 0.1
    held_out = metrics(tmp_path / "whole", "held_out")
    assert [line["step"] for line in held_out] == [6, 12] and held_out[0]["tokens"] == 600
    assert main([str(config), "--out", str(tmp_path / "whole")]) == 1, "a run is never overwritten"

    shorter = write_run(tmp_path, ("checkpoint_every = 5", "checkpoint_every = 5\nkeep = 9"))
    assert main([str(shorter), "--out", str(tmp_path / "stopped")]) == 0
    for step in (10, 12):
        import shutil

        shutil.rmtree(tmp_path / f"stopped/checkpoints/step-{step:08}")
    assert main([str(shorter), "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert np.array_equal(losses(tmp_path / "stopped"), found)
    same_bytes(tmp_path / "whole/checkpoints/step-00000012", tmp_path / "stopped/checkpoints/step-00000012")


@pytest.mark.parametrize(
    "change",
    [
        ("batch = 8", "batch = 8\nmicro_batch = 2"),
        ("batch = 8", "batch = 8\nmicro_batch = 3"),
        ("batch = 8", "batch = 8\nrecompute = true"),
        ("batch = 8", "batch = 8\ndocuments_apart = true"),
        ("[train.optimizer]", '[train.memory]\nstorage = "mapped"\n\n[train.optimizer]'),
    ],
    ids=["micro_batch", "uneven micro_batch", "recompute", "documents_apart", "mapped"],
)
def test_ways_to_save_memory_change_nothing_but_rounding(tmp_path: Path, change: tuple[str, str]) -> None:
    torch.set_num_threads(1)
    runs = {"plain": write_run(tmp_path), "changed": write_run(tmp_path, change)}
    for name, config in runs.items():
        assert main([str(config), "--out", str(tmp_path / name)]) == 0
    if "documents_apart" in change[1]:
        difference = np.abs(losses(tmp_path / "plain") - losses(tmp_path / "changed"))
        assert difference[0] > 1e-6, "documents that do not see each other have other losses"
    else:
        differ_by_rounding(tmp_path / "plain", tmp_path / "changed")


def test_a_step_that_is_not_finite_is_skipped_until_there_are_too_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that drives the weights out of range with the first update: from then on every step is skipped."""
    torch.set_num_threads(1)
    rates = ("muon_rate = 0.01\nadam_rate = 0.01", "muon_rate = 1e38\nadam_rate = 1e38")
    every = ("checkpoint_every = 5", "checkpoint_every = 1\nkeep = 9")
    never = ("evaluate_every = 6", "evaluate_every = 100")
    # The largest step of row-wise Adam is longer than Adam's: rows would be out of range, too.
    rows = ("[train.optimizer]", '[train.memory]\noptimizer = "adam"\n\n[train.optimizer]')
    runaway = write_run(tmp_path, rates, every, never, rows, ("batch = 8", "batch = 8\nskip_limit = 3"))
    run = tmp_path / "run"
    assert main([str(runaway), "--out", str(run)]) == 1
    assert "too many steps in a row had a loss or gradient that is not finite" in capsys.readouterr().err
    lines = metrics(run)
    assert [line.get("skipped", False) for line in lines] == [False, True, True, True]
    assert lines[0]["loss"] is not None and lines[1]["loss"] is None
    # Skipped steps count, but change nothing.
    first, last = (Checkpoint(run / f"checkpoints/step-{step:08}") for step in (1, 4))
    assert (last.state()["step"], last.state()["skipped"], last.state()["skipped_in_a_row"]) == (4, 3, 3)
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = first.tensors(name), last.tensors(name)
        assert all(torch.equal(before[key], after[key]) for key in before), name
    for layer in (0, 1):
        name = f"memory.layer{layer}.table"
        assert (first.folder / name).read_bytes() == (last.folder / name).read_bytes()
    assert main([str(runaway), "--out", str(run), "--resume"]) == 1
    assert len(metrics(run)) == 4, "resumed, the fourth in a row is still one too many"


def test_experts_are_balanced_within_each_sequence(tmp_path: Path) -> None:
    """The loss against its formula, sequence by sequence; it is learned from, but not reported."""
    torch.set_num_threads(1)
    change = ("active = 2", "active = 2\nsequence_balance = 0.3\nscaling = 1.5")
    run = load_run_config(write_run(tmp_path, change))
    torch.manual_seed(0)
    experts = Experts(run.model)
    x = torch.randn(2, 6, 32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    for given, sequences in ((None, [(0, 6), (6, 12)]), (positions, [(0, 3), (3, 6), (6, 7), (7, 12)])):
        _, balance = experts(x, given)
        scores = experts.router(x.flatten(0, 1)).sigmoid()
        choice = scores.topk(2).indices
        total = torch.zeros(())
        for first, last in sequences:
            time = last - first
            f = choice[first:last].flatten().bincount(minlength=4) * 4 / (2 * time)
            p = (scores[first:last] / scores[first:last].sum(-1, keepdim=True)).mean(0)
            total = total + 0.3 * (f * p).sum() / len(sequences)
        assert balance is not None and abs(balance.item() - total.item()) < 1e-6
    assert main([str(write_run(tmp_path, change)), "--out", str(tmp_path / "balanced")]) == 0
    assert (
        main(
            [
                str(write_run(tmp_path, change, ("batch = 8", "batch = 8\nrecompute = true"))),
                "--out",
                str(tmp_path / "recomputed"),
            ]
        )
        == 0
    )
    assert (
        main([str(write_run(tmp_path, ("active = 2", "active = 2\nscaling = 1.5"))), "--out", str(tmp_path / "free")])
        == 0
    )
    differ_by_rounding(tmp_path / "balanced", tmp_path / "recomputed")
    assert losses(tmp_path / "balanced")[0] == losses(tmp_path / "free")[0]
    gradients = [metrics(tmp_path / name)[0]["gradient_norm"] for name in ("balanced", "recomputed", "free")]
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6) and gradients[0] != pytest.approx(
        gradients[2], rel=1e-3
    )


def test_the_parts_of_a_batch(tmp_path: Path) -> None:
    train = load_run_config(write_run(tmp_path)).train
    assert train is not None

    def parts(micro_batch: int | None, parts: int | None, processes: int) -> list[int]:
        return parts_of(dataclasses.replace(train, micro_batch=micro_batch), parts, processes)

    assert parts(None, None, 1) == [8] and parts(3, None, 1) == [3, 3, 2] and parts(None, None, 2) == [4, 4]
    assert parts(2, None, 2) == [2, 2, 2, 2] and parts(5, None, 2) == [5, 3] and parts(8, 4, 2) == [2, 2, 2, 2]
    for wrong in ((None, 3, 1), (None, 2, 4), (3, None, 2)):
        with pytest.raises(ValueError, match="--parts"):
            parts(*wrong)


def test_held_out_windows_are_those_of_the_rust_trainer() -> None:
    # The same windows stand in crates/train/src/evaluate.rs.
    assert stretches(10, 25, 101) == [(20, 10), (70, 10)]
    assert stretches(10, 4, 101) == [(50, 4)]
    assert stretches(10, None, 101) == [(start, 10) for start in range(0, 100, 10)]
    assert stretches(10, None, 26) == [(0, 10), (10, 10), (20, 5)] and stretches(10, None, 5) == [(0, 4)]
    with pytest.raises(ValueError, match="no token to predict"):
        stretches(10, None, 1)


def test_without_held_out_data_there_are_no_held_out_losses(tmp_path: Path) -> None:
    assert main([str(write_run(tmp_path, ('valid = "valid"\n', ""))), "--out", str(tmp_path / "run")]) == 0
    assert len(metrics(tmp_path / "run")) == 12 and not metrics(tmp_path / "run", "held_out")
    assert "held_out" not in Checkpoint(tmp_path / "run").state()


@pytest.mark.parametrize("optimizer", ["adam", "row_wise_adam", "balanced_momentum", "frozen"])
def test_rows_on_the_device_learn_as_those_in_the_store(tmp_path: Path, optimizer: str) -> None:
    torch.set_num_threads(1)
    change = ("[train.optimizer]", f'[train.memory]\noptimizer = "{optimizer}"\n\n[train.optimizer]')
    config = write_run(tmp_path, change)
    for where in ("store", "device"):
        assert main([str(config), "--out", str(tmp_path / where), "--rows", where]) == 0
    differ_by_rounding(tmp_path / "store", tmp_path / "device")


def torchrun(processes: int, *arguments: str, limit: float = 300.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "engram_lm.train", *arguments, "--threads", "1"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)


def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """50 steps on 1, 2 and 4 processes are equal bit for bit; what 4 began, 1 and 2 continue."""
    config = write_run(
        tmp_path, ("steps = 12", "steps = 50"), ("checkpoint_every = 5", "checkpoint_every = 25\nkeep = 9")
    )
    for processes in (1, 2, 4):
        done = torchrun(processes, str(config), "--out", str(tmp_path / f"on{processes}"), "--parts", "4")
        assert done.returncode == 0, done.stderr[-3000:]
    alone = losses(tmp_path / "on1")
    assert len(alone) == 50 and alone[-5:].mean() < alone[:5].mean() - 0.3
    for processes in (2, 4):
        folder = tmp_path / f"on{processes}"
        assert np.array_equal(losses(folder), alone)
        for one, other in zip(rows_of(tmp_path / "on1"), rows_of(folder), strict=True):
            assert np.array_equal(one, other)
        held_out = [metrics(f, "held_out")[-1] for f in (tmp_path / "on1", folder)]
        assert abs(held_out[0]["nats_per_token"] - held_out[1]["nats_per_token"]) <= 1e-4
        assert (held_out[0]["tokens"], held_out[0]["bytes"]) == (held_out[1]["tokens"], held_out[1]["bytes"])

    import shutil

    for processes in (1, 2):
        folder = tmp_path / f"from4on{processes}"
        shutil.copytree(tmp_path / "on4", folder)
        shutil.rmtree(folder / "checkpoints/step-00000050")
        done = torchrun(processes, str(config), "--out", str(folder), "--resume", "--parts", "4")
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(losses(folder)) == 50
        assert np.array_equal(losses(folder), alone)
        for one, other in zip(rows_of(tmp_path / "on1"), rows_of(folder), strict=True):
            assert np.array_equal(one, other)


def test_a_killed_process_ends_the_job_and_its_checkpoint_loads(tmp_path: Path) -> None:
    config = write_run(tmp_path, ("steps = 12", "steps = 100000"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        "-m",
        "engram_lm.train",
        str(config),
        "--out",
        str(tmp_path / "run"),
        "--threads",
        "1",
        "--timeout",
        "20",
    ]
    job = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/checkpoints/step-00000005").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) == 2, children
        os.kill(int(children[1]), signal.SIGKILL)
        _, errors = job.communicate(timeout=90)
    finally:
        job.kill()
        job.wait()
    assert job.returncode != 0
    assert "SIGKILL" in errors or "signal" in errors.lower(), errors[-2000:]
    newest = Checkpoint(tmp_path / "run")
    assert newest.state()["step"] >= 5
    model, tables = newest.model(), newest.tables()
    assert sum(p.numel() for p in model.parameters()) > 0 and sorted(tables) == [0, 1]


def test_every_row_has_one_owner() -> None:
    for rows in (1, 63, 64, 65, 1000):
        for size in (1, 2, 3, 7, 64):
            shares = Shares(rows, size)
            ids = np.arange(rows)
            owners, places = shares.owner(ids), shares.place(ids)
            assert sum(shares.counts) == rows
            for rank in range(size):
                mine = places[owners == rank]
                assert sorted(mine) == list(range(shares.counts[rank]))
    with pytest.raises(ValueError, match="65 processes"):
        Shares(1000, SHARDS + 1)


def test_ids_are_checked_on_arrival() -> None:
    shares = Shares(1000, 2)
    shares.check_arrived(np.array([0, 2, 998]), 0, 1)
    for wrong in (3, 1000, -2, 2**40):
        with pytest.raises(RuntimeError, match=f"received row {wrong} from rank 1"):
            shares.check_arrived(np.array([0, wrong]), 0, 1)


def test_trees_add_alike_whoever_adds() -> None:
    parts = [torch.randn(100) * 10.0**k for k in range(8)]
    whole = tree_sum([part.clone() for part in parts])
    running = TreeSum()
    for part in parts:
        running.add([part.clone()])
    assert torch.equal(running.total()[0], whole)
    for size in (2, 4):
        per_rank = 8 // size
        of_ranks = [tree_sum([p.clone() for p in parts[r * per_rank : (r + 1) * per_rank]]) for r in range(size)]
        assert torch.equal(tree_sum(of_ranks), whole)


def test_the_order_of_windows_is_that_of_the_rust_trainer() -> None:
    # The same numbers stand in crates/train/src/sampler.rs.
    sampler = Sampler(42, 16, 4, 1000)
    assert sampler.windows(0) == 62
    assert sampler.next_starts() == [305, 529, 673, 481]
    assert sampler.next_starts() == [369, 209, 321, 561]
    resumed = Sampler(42, 16, 4, 1000, **sampler.state)
    assert [resumed.next_starts() for _ in range(40)] == [sampler.next_starts() for _ in range(40)]


def test_shards_are_one_sequence(tmp_path: Path) -> None:
    config = load_run_config(write_run(tmp_path))
    assert config.data is not None and config.data.train is not None
    shards = TokenShards(config.data.train)
    assert len(shards.shards) == 3
    whole = np.concatenate([shard.tokens for shard in shards.shards])
    for start, count in ((0, len(whole)), (int(shards.starts[1]) - 3, 7), (5, 0), (len(whole) - 1, 1)):
        assert np.array_equal(shards.read(start, count), whole[start : start + count])
    with pytest.raises(ValueError, match="go beyond"):
        shards.read(len(whole) - 1, 2)
    damaged = shards.shards[1].path
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off or damaged"):
        TokenShards(config.data.train)


def test_documents_begin_with_the_end_of_the_one_before() -> None:
    tokens = np.array([[1, 2, 9, 3, 4, 5], [9, 1, 9, 9, 2, 3]])
    assert positions_of(tokens, 9).tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 0, 0, 1, 2]]


def test_what_cannot_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert main([str(config)]) == 2
    assert main([str(config), "--out", str(tmp_path / "x"), "--resume"]) == 1
    assert "there is no checkpoint" in capsys.readouterr().err
    assert main([str(config), "--out", str(tmp_path / "x"), "--parts", "3"]) == 1
    assert "--parts" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + " ")
    assert main([str(config), "--out", str(tmp_path / "x")]) == 1
    assert "made with another tokenizer" in capsys.readouterr().err
