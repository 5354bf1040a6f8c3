"""Random 512-byte rows of an 8 GiB table through PyTorch's embedding, one thread.

    python benches/pytorch/embedding.py

The peer of `cargo bench -p engram-store --bench gather`: the same table [2^24, 128] of f32, batches of 2^14 random
ids, none repeated between batches. Prints the median.
"""

import statistics
import time

import torch

ROWS, WIDTH, BATCH, BATCHES = 1 << 24, 128, 1 << 14, 200

torch.set_num_threads(1)
with torch.no_grad():
    table = torch.empty(ROWS, WIDTH)
    table.fill_(1.0)  # real pages, not the shared page of zeros
    seconds = []
    for _ in range(BATCHES):
        ids = torch.randint(ROWS, (BATCH,))
        start = time.perf_counter()
        torch.nn.functional.embedding(ids, table)
        seconds.append(time.perf_counter() - start)
median = statistics.median(seconds[10:])
print(f"torch {torch.__version__}: {BATCH / median / 1e6:.2f} M rows/s (median {median * 1e3:.3f} ms per {BATCH} rows)")
