"""Gathering and updating rows: through Python, in Rust itself, and PyTorch's own, by turns. Least times of one run.

python python/benches/rows.py [--gib 8] [--width 64] [--threads 2] [--json]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engram_lm import Table, TrainableTable

REPEATS = 15


def seconds(work: Callable[[], object]) -> list[float]:
    work()
    times = []
    for _ in range(REPEATS):
        times.append(timed(work))
    return times


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gather(gib: float, width: int, folder: Path) -> list[dict[str, float]]:
    """Random rows from a table of `gib` GiB, by turns: ours through Python, ours in Rust, torch's embedding.

    Two tables of that size lie in memory: ours and torch's.
    """
    rows = int(gib * 2**30) // (4 * width)
    path = folder / "rows.table"
    TrainableTable.create(width, rows, optimizer="frozen").save(path)
    table = Table.open(path, tier="ram")
    path.unlink()
    weight = torch.zeros(rows, width)
    found: list[dict[str, float]] = []
    for count in (256, 4096, 16384, 65536):
        out = torch.empty(count, width)
        times: dict[str, list[float]] = {"python": [], "rust": [], "embedding": []}
        works: dict[str, Callable[[torch.Tensor], float]] = {
            "python": lambda ids, out=out: timed(lambda: table.gather(ids, out)),  # type: ignore[misc]
            "rust": lambda ids, out=out: table._gather_seconds(ids, out, 1)[0],  # type: ignore[misc]
            "embedding": lambda ids: timed(lambda: torch.nn.functional.embedding(ids, weight)),
        }
        for turn in range(3 * REPEATS):
            # Each is first as often as the others: PyTorch's threads spin for a while after their work.
            for name in sorted(works, key=lambda name: (list(works).index(name) + turn) % 3):
                # Fresh ids each time: rows come from memory.
                times[name].append(works[name](torch.randint(0, rows, (count,))))
        found.append({"rows": count, **{name: min(of) for name, of in times.items()}})
    return found


def update(width: int, rows: int = 1_000_000, count: int = 16_384) -> dict[str, float]:
    """One Adam step on `count` distinct rows: ours, ours on the device, and SparseAdam with its sparse gradient."""
    from engram_lm.torch import RowTable

    ids = torch.randperm(rows)[:count].sort().values
    grads = torch.randn(count, width)
    store = RowTable.create(width, rows, optimizer="adam")
    device = RowTable.create(width, rows, where="device", optimizer="adam")
    weight = torch.nn.Parameter(torch.zeros(rows, width))
    optimizer = torch.optim.SparseAdam([weight], lr=1e-3)

    def sparse_adam() -> None:
        weight.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), grads, (rows, width), is_coalesced=True)
        optimizer.step()

    works: dict[str, Callable[[], object]] = {
        "store": lambda: store.learn(ids, grads, 1e-3),
        "device": lambda: device.learn(ids, grads, 1e-3),
        "sparse_adam": sparse_adam,
    }
    return {name: min(seconds(work)) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0, help="size of the table; twice as much memory is taken")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = gather(options.gib, options.width, Path(folder))
    steps = update(options.width)
    if options.json:
        print(json.dumps({"gather": found, "update": steps, **vars(options)}))
        return
    print(
        f"{options.gib} GiB of {options.width} f32 a row, {options.threads} threads; milliseconds, least of {REPEATS}"
    )
    print(f"{'rows':>8}{'python':>10}{'rust':>10}{'share':>8}{'embedding':>12}{'times':>8}")
    for entry in found:
        python, rust, torchs = (1e3 * entry[name] for name in ("python", "rust", "embedding"))
        numbers = f"{python:>10.3f}{rust:>10.3f}{rust / python:>8.2f}{torchs:>12.3f}{torchs / python:>8.2f}"
        line = f"{int(entry['rows']):>8}{numbers}"
        print(line)
    store, device, sparse = (1e3 * steps[name] for name in ("store", "device", "sparse_adam"))
    print(
        f"update of 16384 rows of 1M: store {store:.2f}, device {device:.2f}, SparseAdam {sparse:.2f}: "
        f"{sparse / store:.1f} and {sparse / device:.1f} times"
    )


if __name__ == "__main__":
    main()
