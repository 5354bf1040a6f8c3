"""Times training steps of the model in plain PyTorch f32: row lookup, forward, backward, clipping, update.

    python train_step.py --config CONFIG.toml --batch 16 --context 256 --threads 2 [--json] [--profile]

Tokens are random with a Zipf distribution, fresh ones each step. Nothing is compiled; what PyTorch ships is
used as it comes: scaled_dot_product_attention, fused AdamW, SparseAdam.
"""

import argparse
import json
import math
import resource
import statistics
import sys
import time
from contextlib import contextmanager

import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import LanguageModel, ModelConfig

RATE = 1e-3  # of Muon and AdamW; memory rows learn at five times that, without decay
DECAY = 0.1


def primes_above(start, used):
    """The next primes above `start` that no head has yet."""
    candidate = start
    while True:
        candidate += 1
        prime = candidate > 1 and all(candidate % d for d in range(2, math.isqrt(candidate) + 1))
        if prime and candidate not in used:
            used.add(candidate)
            yield candidate


class MemoryTables(nn.Module):
    """The n-gram tables of every memory layer: tokens [B, T] to rows [B, T, d_mem], with sparse gradients."""

    def __init__(self, config):
        super().__init__()
        memory, used = config.memory, set()
        self.orders = range(2, memory.max_order + 1)
        # The step costs the same whatever the classes are, so every token is one of its own here.
        self.register_buffer("classes", torch.arange(config.vocabulary))
        self.pad = memory.pad_id
        self.layers, self.multipliers, self.primes, self.offsets = memory.layers, [], [], []
        self.tables = nn.ModuleList()
        for layer in memory.layers:
            bound = max(1, (2**63 - 1) // config.vocabulary // 2)
            draws = numpy.random.default_rng(memory.seed + 10007 * layer).integers(0, bound, memory.max_order)
            self.multipliers.append([2 * int(v) + 1 for v in draws])
            sizes = []
            for base in memory.rows_per_head:
                search = primes_above(base - 1, used)
                sizes.append([next(search) for _ in range(memory.heads)])
            sizes = torch.tensor(sizes)  # [orders, heads]
            self.primes.append(sizes)
            self.offsets.append((sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes))
            table = nn.Embedding(int(sizes.sum()), memory.row_width, sparse=True)
            nn.init.normal_(table.weight, std=memory.row_init)
            self.tables.append(table)

    def ids(self, tokens, index):
        """[B, T] to [B, T, orders·heads]: multiply, xor, mod."""
        time, longest = tokens.shape[1], self.orders[-1]
        padded = F.pad(self.classes[tokens], (longest - 1, 0), value=int(self.classes[self.pad]))
        parts = [padded[:, longest - 1 - k :][:, :time] * m for k, m in enumerate(self.multipliers[index])]
        mixes, mix = [], parts[0]
        for part in parts[1:]:
            mix = mix ^ part
            mixes.append(mix)
        mix = torch.stack(mixes, -1).unsqueeze(-1)  # [B, T, orders, 1]
        return (mix % self.primes[index] + self.offsets[index]).flatten(-2)

    def forward(self, tokens):
        return {
            layer: table(self.ids(tokens, index)).flatten(-2)
            for index, (layer, table) in enumerate(zip(self.layers, self.tables))
        }


def newton_schulz(g, steps=5):
    """The orthogonal factor of matrices [count, rows, columns], roughly (Muon, arXiv 2502.16982)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices [rows, columns] and stacks of them, with the update scaled to AdamW's size."""

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                average = state["momentum"].lerp_(p.grad, 1 - momentum)
                nesterov = p.grad.lerp(average, momentum)
                update = newton_schulz(nesterov.view(-1, *p.shape[-2:])).view_as(p)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape[-2:])))


def is_matrix(name, parameter):
    """Whether Muon trains it, as in crates/train/src/optimizer.rs: a projection or a stack of experts'."""
    others = ("router", "norm", "convolution", "_streams")
    return name.startswith("blocks.") and not any(o in name for o in others) and parameter.dim() >= 2


class Trainer:
    def __init__(self, config):
        self.model = LanguageModel(config)
        self.tables = MemoryTables(config) if config.memory else None
        named = list(self.model.named_parameters())
        self.dense = [p for _, p in named]
        matrices = [p for name, p in named if is_matrix(name, p)]
        rest = [p for name, p in named if not is_matrix(name, p)]
        self.muon = Muon(matrices, lr=RATE, weight_decay=DECAY)
        self.adamw = torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
        rows = list(self.tables.parameters()) if self.tables else []
        self.sparse_adam = torch.optim.SparseAdam(rows, lr=5 * RATE) if rows else None
        self.phases = {}

    @contextmanager
    def phase(self, name):
        start = time.perf_counter()
        yield
        self.phases.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    def step(self, tokens, targets):
        with self.phase("rows"):
            memory = self.tables(tokens) if self.tables else {}
        with self.phase("forward"):
            loss = self.model(tokens, targets, memory)
        with self.phase("backward"):
            loss.backward()
        with self.phase("clip"):  # memory rows are left out
            nn.utils.clip_grad_norm_(self.dense, 1.0)
        with self.phase("muon"):
            self.muon.step()
        with self.phase("adamw"):
            self.adamw.step()
        with self.phase("sparse_adam"):
            if self.sparse_adam:
                self.sparse_adam.step()
        with self.phase("rest"):
            self.model.rebalance()
            for optimiser in (self.muon, self.adamw, self.sparse_adam):
                if optimiser:
                    optimiser.zero_grad()
            return loss.item()


def zipf_batches(vocabulary, batch, context, seed):
    """Tokens and those after them, [batch, context] each; token r has a probability like 1/(r + 1)."""
    shares = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.multinomial(shares, batch * (context + 1), replacement=True, generator=random)
        drawn = drawn.view(batch, context + 1)
        yield drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def peak_mib():
    """Most memory this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def profile(trainer, batches, steps=3):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            trainer.step(*next(batches))
    print(f"operators over {steps} steps, by their own time:")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    print("the same by shapes of their inputs:")
    by_shape = profiler.key_averages(group_by_input_shape=True)
    print(by_shape.table(sort_by="self_cpu_time_total", row_limit=40, max_shapes_column_width=70))


def main():
    parser = argparse.ArgumentParser(description="Times full training steps in plain PyTorch f32 on the CPU.")
    parser.add_argument("--config", required=True, help="TOML file with a [model] table")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--context", type=int, help="tokens in a sequence; default: the model's context")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--profile", action="store_true", help="print the operators that take the time")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = ModelConfig.load(args.config)
    context = args.context or config.context
    idle = peak_mib()
    trainer = Trainer(config)
    batches = zipf_batches(config.vocabulary, args.batch, context, args.seed)
    losses = [trainer.step(*next(batches)) for _ in range(args.warm_up)]
    trainer.phases.clear()
    times = []
    for _ in range(args.steps):
        batch = next(batches)
        start = time.perf_counter()
        losses.append(trainer.step(*batch))
        times.append(1e3 * (time.perf_counter() - start))
    median = statistics.median(times)
    result = {
        "framework": f"PyTorch {torch.__version__}",
        "config": args.config,
        "threads": args.threads,
        "batch": args.batch,
        "context": context,
        "steps": args.steps,
        "dense_parameters": sum(p.numel() for p in trainer.dense),
        "memory_parameters": sum(p.numel() for p in trainer.tables.parameters()) if trainer.tables else 0,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "step_ms": {"median": median, "min": min(times), "max": max(times)},
        "tokens_per_second": 1e3 * args.batch * context / median,
        "phase_ms": {name: statistics.median(values) for name, values in trainer.phases.items()},
        "peak_rss_mib": peak_mib(),
        "rss_before_model_mib": idle,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['framework']}, {args.threads} threads, {args.batch}×{context} tokens a step")
        print(f"step    {median:.1f} ms (least {min(times):.1f}, most {max(times):.1f})")
        print(f"speed   {result['tokens_per_second']:.0f} tokens/s")
        print("phases  " + ", ".join(f"{name} {ms:.1f}" for name, ms in result["phase_ms"].items()) + " ms")
        print(f"memory  {result['peak_rss_mib']:.0f} MiB at the peak, {idle:.0f} MiB of it before the model")
        print(f"loss    {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    if args.profile:
        profile(trainer, batches)


if __name__ == "__main__":
    main()
