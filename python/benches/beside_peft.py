"""Memory of this package and of `engram-peft` before blocks of one small Llama: seconds a step, peak memory, loss.

    pip install engram_lm-*.whl torch transformers safetensors tokenizers engram-peft
    python python/benches/beside_peft.py [--steps 60] [--rows 100000] [--rounds 3] [--threads 2]

Both begin with the same base and train all of it on the same windows of this repository's own source, with the same
rates: Adam for weights, sparse Adam at five times the rate for rows. Each run is a process of its own; the packages
take turns. The embedding of n-grams has the same heads, rows and width in both; hashes and first values differ.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY, CONTEXT, BATCH, WIDTH, BLOCKS = 2048, 128, 8, 128, 4
LAYERS, HEADS, ROW_WIDTH = [1, 2], 4, 16
RATE, FACTOR = 1e-3, 5.0
PACKAGES = ("engram-lm", "engram-lm, device", "engram-peft", "without")

Step = Callable[[torch.Tensor], float]  # tokens [batch, context] in, loss out


def corpus(folder: Path) -> None:
    """A tokenizer and the tokens of this repository's Rust source, in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = [str(path) for path in sorted((REPOSITORY / "crates").rglob("*.rs"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<pad>"]
    tokenizer.train(
        files, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "\n".join(Path(path).read_text() for path in files)
    torch.save(torch.tensor(tokenizer.encode(text).ids), folder / "tokens.pt")


def base() -> Any:
    """The same small Llama each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).train()


def training_step(model: Any, optimizer: torch.optim.Optimizer, after: Callable[[], object] = lambda: None) -> Step:
    """A step of `optimizer`, and what comes `after` it."""

    def step(tokens: torch.Tensor) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        return float(loss.detach())

    return step


def ours(folder: Path, rows: int, where: Any) -> Step:
    """This package's memory by `attach`."""
    from engram_lm.config import MemoryConfig
    from engram_lm.hf import attach

    model = base()
    config = MemoryConfig(LAYERS, 3, HEADS, ROW_WIDTH, [rows, rows], form="paper", pad_id=1)
    memory = attach(model, config, tokenizer=folder / "tokenizer.json", where=where, freeze=False)
    optimizer = torch.optim.Adam(model.parameters(), RATE)

    return training_step(model, optimizer, lambda: memory.step(FACTOR * RATE))


def peft(folder: Path, rows: int) -> Step:
    """engram-peft's, with the optimiser that it makes."""
    if sys.version_info < (3, 12):
        # engram-peft 1.2.7 installs on Python 3.11, but imports this from 3.12's `typing`.
        import typing

        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined, unused-ignore]
    from engram_peft import EngramConfig, get_engram_model
    from engram_peft.utils import get_optimizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    config = EngramConfig(
        engram_vocab_size_per_ngram=[rows, rows],
        ngram_sizes=[2, 3],
        n_head_per_ngram=HEADS,
        embedding_dim=2 * HEADS * ROW_WIDTH,
        target_layers=LAYERS,
        hc_mult=1,
        hidden_size=WIDTH,
        learning_rate_multiplier=FACTOR,
        pad_id=1,
    )
    model = get_engram_model(base(), config, tokenizer, train_mode="full_finetune")
    model.train()
    optimizer = get_optimizer(model, base_learning_rate=RATE)

    return training_step(model, optimizer)


def without() -> Step:
    """The base alone."""
    model = base()
    optimizer = torch.optim.Adam(model.parameters(), RATE)

    return training_step(model, optimizer)


def measure(package: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step after five, this process's peak memory in MiB, and the mean loss of the last ten."""
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], Step]] = {
        "engram-lm": lambda: ours(folder, options.rows, "store"),
        "engram-lm, device": lambda: ours(folder, options.rows, "device"),
        "engram-peft": lambda: peft(folder, options.rows),
        "without": without,
    }
    tokens = torch.load(folder / "tokens.pt")
    step = makers[package]()
    random = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(options.steps):
        starts = torch.randint(0, len(tokens) - CONTEXT, (BATCH,), generator=random)
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])
        begun = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(seconds[5:]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": statistics.mean(losses[-10:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--package", choices=PACKAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.package:
        print("\n" + json.dumps(measure(options.package, options.folder, options)))
        return
    found: dict[str, list[dict[str, float]]] = {package: [] for package in PACKAGES}
    with tempfile.TemporaryDirectory() as folder:
        corpus(Path(folder))
        for _ in range(options.rounds):
            for package in PACKAGES:
                command = [sys.executable, __file__, "--package", package, "--folder", folder]
                for name in ("steps", "rows", "threads"):
                    command += [f"--{name}", str(getattr(options, name))]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[package].append(json.loads(result.stdout.splitlines()[-1]))
    print(f"{'':18}{'ms a step':>10}{'of peft':>9}{'peak MiB':>10}{'loss':>8}  least of {options.rounds}")
    other = min(run["seconds"] for run in found["engram-peft"])
    for package, runs in found.items():
        seconds = min(run["seconds"] for run in runs)
        peak, loss = min(run["peak_mib"] for run in runs), runs[0]["loss"]
        print(f"{package:18}{1e3 * seconds:>10.1f}{seconds / other:>9.2f}{peak:>10.0f}{loss:>8.3f}")


if __name__ == "__main__":
    main()
