"""Writes sparse_adam.json: what PyTorch's SparseAdam makes of a small table.

    python sparse_adam.py            # needs torch; writes beside this script

Each step gives the rows it touches (ascending, distinct) and their gradients; "values" is the whole table
after the step. Numbers have all their digits, so that reading them back loses nothing.
"""

import json
import pathlib

import torch

ROWS, WIDTH, STEPS, RATE, BETAS, EPSILON = 7, 3, 12, 0.01, (0.9, 0.999), 1e-8

generator = torch.Generator().manual_seed(20)
initial = torch.randn(ROWS, WIDTH, generator=generator)
table = torch.nn.Parameter(initial.clone())
optimizer = torch.optim.SparseAdam([table], lr=RATE, betas=BETAS, eps=EPSILON)
steps = []
for step in range(STEPS):
    ids = torch.randperm(ROWS, generator=generator)[: 1 + step % 4].sort().values
    grads = torch.randn(len(ids), WIDTH, generator=generator) * 10.0 ** (step % 5 - 3)
    table.grad = torch.sparse_coo_tensor(ids[None], grads, (ROWS, WIDTH), check_invariants=True).coalesce()
    optimizer.step()
    steps.append({"ids": ids.tolist(), "grads": grads.flatten().tolist(), "values": table.flatten().tolist()})

golden = {"torch": torch.__version__.split("+")[0], "rows": ROWS, "width": WIDTH, "rate": RATE,
          "betas": BETAS, "epsilon": EPSILON, "initial": initial.flatten().tolist(), "steps": steps}
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")
