"""Forked processes get an error and never hang; threads work side by side."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engram_lm import Addressing, Table, TrainableTable

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def in_child(work: Callable[[], None], limit: float = 30.0) -> str:
    """What `work` did in a forked child: "" or the exception it raised. A child that hangs is a failure."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        message = ""
        try:
            work()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + limit
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"the child hung for {limit} s")
        time.sleep(0.01)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_rows_in_a_forked_child_are_an_error(table_file: Path, tmp_path: Path) -> None:
    table = Table.open(table_file)
    big = np.random.default_rng(0).integers(0, table.rows, 200_000)
    table.gather(big)  # the threads that share large batches are running
    waiting = table.prefetch([1])
    trainable = TrainableTable.open(table_file)
    grads = np.zeros((1, 8), np.float32)
    works: dict[str, Callable[[], object]] = {
        "gather": lambda: table.gather(big),
        "a small gather": lambda: table.gather([1]),
        "lookup_into": lambda: table.lookup_into([1], np.empty((1, 32), np.uint8)),
        "prefetch": lambda: table.prefetch([1]),
        "take": waiting.take,
        "ready": lambda: waiting.ready,
        "open": lambda: Table.open(table_file),
        "stats": table.stats,
        "create": lambda: TrainableTable.create(8, 10, optimizer="adam"),
        "update": lambda: trainable.update([1], grads, 0.1),
        "save": lambda: trainable.save(tmp_path / "child.table"),
        "step": lambda: trainable.step,
    }
    for name, work in works.items():
        message = in_child(lambda work=work: work())  # type: ignore[misc]
        assert message.startswith("RuntimeError: process "), f"{name}: {message!r}"
        assert f"was forked from process {os.getpid()}" in message
        assert "spawn" in message
    assert np.asarray(waiting.take()).shape == (1, 8), "the parent goes on"


def test_dropping_what_was_forked_does_not_hang(table_file: Path) -> None:
    held = [Table.open(table_file)]
    held[0].gather(np.zeros(100_000, np.int64))
    tickets = [held[0].prefetch(np.zeros(1000, np.int64)) for _ in range(20)]

    def drop() -> None:
        tickets.clear()
        held.clear()

    assert in_child(drop) == ""


def test_addressing_works_in_a_forked_child(addressing: Addressing, table_file: Path) -> None:
    Table.open(table_file).gather([1])
    layer = addressing.layer(1)
    tokens = np.arange(40)
    expected = bytes(layer.row_ids(tokens))

    def work() -> None:
        assert bytes(layer.row_ids(tokens)) == expected
        assert bytes(layer.history().extend(tokens)) == expected

    assert in_child(work) == ""


def test_many_threads_read_and_update_at_once(addressing: Addressing) -> None:
    rows, width = 5000, 16
    table = TrainableTable.create(width, rows, optimizer="frozen", deviation=1.0)
    expected = np.asarray(table.gather(np.arange(rows))).copy()
    errors: list[BaseException] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(30):
                ids = random.integers(0, rows, 3000)
                assert np.array_equal(table.gather(ids), expected[ids])
                table.update(ids[:5], np.ones((5, width), np.float32), 0.1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert table.step == 180


def test_the_interpreter_runs_while_rows_are_fetched(tmp_path: Path) -> None:
    table = TrainableTable.create(256, 40_000, optimizer="frozen", deviation=1.0)
    ids = np.random.default_rng(0).integers(0, 40_000, 400_000)
    out = np.empty((len(ids), 256), np.float32)
    table.gather(ids, out)
    begun, counted = threading.Event(), [0]

    def count() -> None:
        begun.wait()
        while begun.is_set():
            counted[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    begun.set()
    while counted[0] == 0:
        time.sleep(0.001)
    before, start = counted[0], time.perf_counter()
    table.gather(ids, out)
    seconds, steps = time.perf_counter() - start, counted[0] - before
    begun.clear()
    counter.join()
    assert steps > 100, f"another thread made {steps} steps in {seconds:.3f} s of gathering"
