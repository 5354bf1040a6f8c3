"""Random rows of an 8 GiB table through PyTorch's embedding, one thread.

    python benches/pytorch/embedding.py
    PYTHON=python cargo bench -p engram-store --bench peers

The first prints the medians of `embedding` as one calls it, and of `index_select` into a buffer that is used
again, for 512-byte rows (128 of f32) in batches of 2^14 random ids, new ones for each batch. The second
measures 264- and 512-byte rows in turn with `engram-store`: it runs this file with `--paired WIDTH`, which runs
as many batches of `embedding`, of as many ids, as each line it is sent says, and answers with their median seconds.
"""

import statistics
import sys
import time

import torch

PAIRED = len(sys.argv) == 3 and sys.argv[1] == "--paired"
WIDTH, BATCH, BATCHES = int(sys.argv[2]) if PAIRED else 128, 1 << 14, 200
ROWS = (8 << 30) // (4 * WIDTH)

torch.set_num_threads(1)
with torch.no_grad():
    table = torch.empty(ROWS, WIDTH)
    table.fill_(1.0)  # real pages, not the shared page of zeros
    out = torch.zeros(BATCH, WIDTH)

    def seconds(gather, batch=BATCH):
        ids = torch.randint(ROWS, (batch,))
        start = time.perf_counter()
        gather(ids)
        return time.perf_counter() - start

    def embedding(ids):
        return torch.nn.functional.embedding(ids, table)

    if PAIRED:
        for line in sys.stdin:
            batches, batch = map(int, line.split())
            print(statistics.median([seconds(embedding, batch) for _ in range(batches)]), flush=True)
        sys.exit()
    for name, gather in [
        ("embedding", embedding),
        ("index_select into a buffer", lambda ids: torch.index_select(table, 0, ids, out=out)),
    ]:
        median = statistics.median([seconds(gather) for _ in range(BATCHES)][10:])
        rate = BATCH / median / 1e6
        print(f"torch {torch.__version__}, {name}: {rate:.2f} M rows/s ({median * 1e3:.3f} ms a batch)")
