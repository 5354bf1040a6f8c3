"""Trains a model from a configuration, alone or under `torchrun`: `python -m engram_lm.train config.toml --out runs/x`.

The data order, the schedules, `metrics.jsonl` and the checkpoints are those of `engram train`: begin a run with one
and continue it with the other. Under `torchrun`, weights are copied to all processes, and memory rows are shared among
them.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; gives its exit status: 0, 1 if the run failed, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        if options.plan:
            from engram_lm.plan import plan

            print(plan(options.config, options.gpus))
            return 0
        if options.out is None:
            print("error: name the run's folder with --out", file=sys.stderr)
            return 2
        return _train(options)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        rank = os.environ.get("RANK")
        print(f"error{'' if rank is None else f' on rank {rank}'}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m engram_lm.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="TOML file of the run, as for `engram train`")
    parser.add_argument("--out", type=Path, help="folder of the run: checkpoints and metrics.jsonl")
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint in --out")
    parser.add_argument("--from", dest="source", type=Path, help="begin with the weights and rows of this checkpoint")
    parser.add_argument("--rows", choices=["store", "device"], default="store", help="where memory rows are")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    parser.add_argument("--parts", type=int, help="parts of a batch whose gradients are added in a fixed order")
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for another process")
    parser.add_argument("--plan", action="store_true", help="print memory and traffic of a run, and start nothing")
    parser.add_argument("--gpus", type=int, default=1, help="processes of the plan")
    return parser


def _train(options: argparse.Namespace) -> int:
    import torch

    from engram_lm.config import load_run_config
    from engram_lm.torch.group import Group
    from engram_lm.torch.trainer import Options, Trainer

    if options.threads:
        torch.set_num_threads(options.threads)
    run = load_run_config(options.config)
    group = Group(options.timeout)
    chosen = Options(options.rows, options.compile, options.parts)
    if options.resume:
        trainer = Trainer.resume(run, options.out, group, chosen)
    else:
        trainer = Trainer.begin(run, options.out, group, chosen, options.source)
    stop = _Stop()
    log = (options.out / "metrics.jsonl").open("a") if group.rank == 0 else None

    def report(line: dict[str, Any]) -> None:
        if log is not None:
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(_text(line, trainer.config.steps), flush=True)

    config = trainer.config
    while trainer.step_count < config.steps:
        report(trainer.step())
        step = trainer.step_count
        last = step == config.steps
        if step % config.evaluate_every == 0 or last:
            held_out = trainer.evaluate()
            if held_out is not None:
                report(held_out)
        asked = bool(group.tell(int(stop.asked)))
        if step % config.checkpoint_every == 0 or last or asked:
            if log is not None:
                os.fsync(log.fileno())
            trainer.save()
        if asked and not last:
            if group.rank == 0:
                print(f"stopped after step {step}; continue with --resume")
            break
    group.leave()
    return 0


def _text(line: dict[str, Any], steps: int) -> str:
    if line.get("skipped"):
        return f"step {line['step']}/{steps}  skipped: its loss or a gradient is not finite  {line['seconds']:.2f} s"
    if line["kind"] == "step":
        return f"step {line['step']}/{steps}  loss {line['loss']:.4f}  {line['seconds']:.2f} s"
    nats, bits = line["nats_per_token"], line["bits_per_byte"]
    return f"step {line['step']}: held-out {nats:.4f} nats/token, {bits:.4f} bits/byte"


class _Stop:
    """Whether Ctrl-C, or a request to end, has asked for a checkpoint and an end. A second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


if __name__ == "__main__":
    sys.exit(main())
