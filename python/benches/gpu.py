"""Tokens per second of the twin on a GPU: with memory in host RAM, on the device, and without; and peak memory.

    pip install engram_lm-*.whl torch numpy safetensors && python python/benches/gpu.py [--minutes 8] [--out gpu.json]

Three sizes: about 24, 125 and 350 million active parameters, bf16, compiled, 1024 tokens a sequence. One JSON object a
line, so that what was measured stays if time runs out.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from steps import Run, batches

from engram_lm.config import (
    FeedForwardConfig,
    HyperConnectionConfig,
    LatentAttentionConfig,
    MemoryConfig,
    ModelConfig,
)
from engram_lm.torch.rows import Where

VOCABULARY, CONTEXT = 32_768, 1024
SIZES = {"24M": (384, 6, 6, 64), "125M": (768, 12, 12, 32), "350M": (1024, 24, 16, 16)}  # width, blocks, heads, batch


def model(width: int, blocks: int, heads: int, memory: bool) -> ModelConfig:
    """A dense backbone with four streams; memory before the second and the middle block, 10M rows of 64."""
    head = width // heads
    attention = LatentAttentionConfig(heads, width // 4, head, head // 2, head, query_rank=width // 2)
    tables = MemoryConfig([1, blocks // 2], 3, 8, 64, [300_000, 300_000], form="v41", compression="none", pad_id=1)
    return ModelConfig(
        VOCABULARY,
        width,
        blocks,
        CONTEXT,
        attention,
        FeedForwardConfig(width * 8 // 3 // 64 * 64),
        hyper_connections=HyperConnectionConfig(4),
        memory=tables if memory else None,
    )


def measure(size: str, where: Where | None, device: str, steps: int) -> dict[str, object]:
    """Tokens per second over `steps` steps after ten to warm up."""
    width, blocks, heads, batch = SIZES[size]
    config = model(width, blocks, heads, where is not None)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(config, where or "device", device, bf16=True)
    run.model.compile()
    data = batches(VOCABULARY, batch, CONTEXT, steps + 11)
    for number in range(10):
        run.step(data[number], data[number + 1][0])
    start = time.perf_counter()
    for number in range(10, 10 + steps):
        loss = run.step(data[number], data[number + 1][0])
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "size": size,
        "memory": where or "none",
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "rows": sum(table.rows for table in run.tables.values()),
        "tokens_per_second": steps * batch * CONTEXT / seconds,
        "peak_gib": peak / 2**30,
        "loss": loss,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new after so long")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    options = parser.parse_args()
    begun = time.monotonic()
    wheres: list[Where | None] = [None, "store", "device"]
    with options.out.open("a") as file:
        for size in options.sizes:
            without = 0.0
            for where in wheres:
                if time.monotonic() - begun > 60 * options.minutes:
                    print("out of time")
                    return
                found = measure(size, where, options.device, options.steps)
                speed = float(str(found["tokens_per_second"]))
                without = without or speed
                found["share"] = speed / without
                file.write(json.dumps(found) + "\n")
                file.flush()
                print(
                    f"{size:>5} {found['memory']:>7} {speed:12.0f} tokens/s, {speed / without:.3f} of without, "
                    f"{found['peak_gib']:.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
