"""Random 512-byte rows of an 8 GiB table through PyTorch's embedding, one thread.

    python benches/pytorch/embedding.py

The peer of `cargo bench -p engram-store --bench gather`: the same table [2^24, 128] of f32, batches of 2^14
random ids, new ones for each batch. Prints the medians of `embedding` as one calls it, and of `index_select`
into a buffer that is used again, as the Rust bench uses its own.
"""

import statistics
import time

import torch

ROWS, WIDTH, BATCH, BATCHES = 1 << 24, 128, 1 << 14, 200

torch.set_num_threads(1)
with torch.no_grad():
    table = torch.empty(ROWS, WIDTH)
    table.fill_(1.0)  # real pages, not the shared page of zeros
    out = torch.zeros(BATCH, WIDTH)
    for name, gather in [
        ("embedding", lambda ids: torch.nn.functional.embedding(ids, table)),
        ("index_select into a buffer", lambda ids: torch.index_select(table, 0, ids, out=out)),
    ]:
        seconds = []
        for _ in range(BATCHES):
            ids = torch.randint(ROWS, (BATCH,))
            start = time.perf_counter()
            gather(ids)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[10:])
        rate = BATCH / median / 1e6
        print(f"torch {torch.__version__}, {name}: {rate:.2f} M rows/s ({median * 1e3:.3f} ms a batch)")
