"""One PyTorch SparseAdam step on 1024 rows of a table of 1M x 64, one thread.

    python benches/pytorch/sparse_adam.py

The peer of `cargo bench -p engram-store --bench row_optimizer`. The gradient is the sparse tensor that
`torch.nn.Embedding(sparse=True)` makes; merging its duplicates is part of the step, there and here.
Prints the median.
"""

import statistics
import time

import torch

ROWS, WIDTH, TOUCHED, STEPS = 1_000_000, 64, 1024, 200

torch.set_num_threads(1)
table = torch.nn.Parameter(torch.randn(ROWS, WIDTH) * 0.02)
optimizer = torch.optim.SparseAdam([table], lr=1e-3)
grads = torch.full((TOUCHED, WIDTH), 0.01)
# Touch every row once: state in first use would also pay for its pages.
table.grad = torch.sparse_coo_tensor(
    torch.arange(ROWS)[None], torch.full((ROWS, WIDTH), 0.01), (ROWS, WIDTH), check_invariants=False
)
optimizer.step()
seconds = []
for _ in range(STEPS):
    ids = torch.randint(ROWS, (1, TOUCHED))
    table.grad = torch.sparse_coo_tensor(ids, grads, (ROWS, WIDTH), check_invariants=False)
    start = time.perf_counter()
    optimizer.step()
    seconds.append(time.perf_counter() - start)
print(f"torch {torch.__version__}: {statistics.median(seconds[10:]) * 1e3:.3f} ms per step")
