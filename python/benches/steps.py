"""Training steps of the twin beside `benches/pytorch/train_step.py`, by turns, and rows in the store beside the device.

python python/benches/steps.py --config configs/quickstart-memory.toml [--batch 16] [--threads 2] [--rounds 3]
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from engram_lm import optimizers
from engram_lm._addressing import of_memory
from engram_lm.config import ModelConfig, OptimizerConfig, load_model_config
from engram_lm.torch import LanguageModel, Optimizer, RowTable
from engram_lm.torch.rows import Where

SCRIPT = Path(__file__).resolve().parents[2] / "benches/pytorch/train_step.py"


class Run:
    """A model and its tables with everything that a training step does."""

    def __init__(self, config: ModelConfig, where: Where, device: str = "cpu", bf16: bool = False) -> None:
        self.config, self.device, self.bf16 = config, device, bf16
        self.model = LanguageModel(config).to(device).train()
        self.optimizer = Optimizer(self.model, OptimizerConfig(muon_rate=1e-3, adam_rate=1e-3))
        self.tables: dict[int, RowTable] = {}
        if config.memory is not None:
            self.addressing = of_memory(config.memory, None, config.vocabulary)
            for layer in config.memory.layers:
                chosen = self.addressing.layer(layer)
                self.tables[layer] = RowTable.create(
                    config.memory.row_width, addressing=chosen, where=where, device=device, optimizer=optimizers.Adam()
                )
        self.ahead: dict[int, torch.Tensor] = {}

    def ids(self, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        """Row ids of every memory layer."""
        found = {}
        for layer in self.tables:
            chosen = self.addressing.layer(layer)
            out = torch.empty(*tokens.shape, chosen.slots, dtype=torch.int64)
            found[layer] = chosen.row_ids(tokens, out=out)
        return found

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], following: torch.Tensor) -> float:
        """One step; gives the loss. `following`: the next step's tokens, whose rows are fetched meanwhile."""
        tokens, targets = batch
        ids = self.ahead or self.ids(tokens)
        fetched = {layer: table.fetch(ids[layer]) for layer, table in self.tables.items()}
        self.ahead = self.ids(following)
        for layer, table in self.tables.items():
            table.prefetch(self.ahead[layer])
        memory = {layer: rows.embed() for layer, rows in fetched.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.model(tokens.to(self.device), targets.to(self.device), memory)
        loss.backward()
        self.optimizer.step(1.0)
        self.optimizer.zero_grad()
        self.model.rebalance()
        for layer, table in self.tables.items():
            table.update(fetched[layer], 5e-3)
        return float(loss.detach())


def batches(vocabulary: int, batch: int, context: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random tokens with a Zipf distribution, and those after them."""
    shares = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(shares, count * batch * (context + 1), True, generator=random)
    return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in drawn.view(count, batch, context + 1)]


def milliseconds(run: Run, data: list[tuple[torch.Tensor, torch.Tensor]], warm_up: int = 3) -> float:
    """The median step."""
    times = []
    for batch, following in itertools.pairwise(data):
        start = time.perf_counter()
        run.step(batch, following[0])
        if run.device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[warm_up:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = load_model_config(options.config)
    data = batches(config.vocabulary, options.batch, config.context, options.steps + 4)
    found: dict[str, list[float]] = {"store": [], "device": [], "script": []}
    for _ in range(options.rounds):
        for where in ("store", "device"):
            found[where].append(milliseconds(Run(config, where), data))
        command = [sys.executable, str(SCRIPT), "--config", options.config, "--batch", str(options.batch), "--json"]
        command += ["--threads", str(options.threads), "--steps", str(options.steps)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        found["script"].append(json.loads(result.stdout)["step_ms"]["median"])
    for name, times in found.items():
        print(f"{name:8} {min(times):8.1f} ms at least, {statistics.median(times):8.1f} ms median of {options.rounds}")
    print(
        f"twin / script {min(found['store']) / min(found['script']):.3f}, store / device "
        f"{min(found['store']) / min(found['device']):.3f} (of the least)"
    )


if __name__ == "__main__":
    main()
