"""Our decoder beside llama.cpp: the same file, in turns, medians.

    pip install llama-cpp-python
    cargo build --release -p engram-infer --example speed
    python benches/llama_cpp/compare.py MODEL.gguf [--turns 5] [--threads 2]

Both read 512 tokens and then decode 64 after a prompt of 16, one sequence, greedily. The two programs take turns, so that a
machine whose speed changes treats both alike. Leave the machine idle otherwise. Prints tokens per second and their ratio.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEED = ROOT / "target/release/examples/speed"


def tokens(count: int, seed: int, vocabulary: int) -> list[int]:
    """The same as in the example `speed`."""
    return [(seed * 7919 + at * 104_729 + 13) % vocabulary for at in range(count)]


def theirs(llama, turn: int) -> dict[str, float]:
    """Tokens per second of one turn."""
    vocabulary = llama.n_vocab()
    llama.reset()
    begun = time.perf_counter()
    llama.eval(tokens(512, turn, vocabulary))
    prefill = 512 / (time.perf_counter() - begun)
    llama.reset()
    llama.eval(tokens(16, 1000 * (turn + 1), vocabulary))
    token = llama.sample(temp=0.0)
    begun = time.perf_counter()
    for _ in range(63):
        llama.eval([token])
        token = llama.sample(temp=0.0)
    return {"prefill_512": prefill, "decode_1": 63 / (time.perf_counter() - begun)}


def ours(model: str, dtype: str, threads: int) -> dict[str, float]:
    """Tokens per second of one turn, by a process of its own."""
    environment = {"RAYON_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin"}
    line = subprocess.check_output([SPEED, model, dtype, "1"], env=environment, text=True)
    return json.loads(line)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="file")
    arguments = parser.parse_args()

    import llama_cpp

    llama = llama_cpp.Llama(
        arguments.model,
        n_ctx=1024,
        n_batch=512,
        n_threads=arguments.threads,
        n_threads_batch=arguments.threads,
        verbose=False,
    )
    found: dict[str, dict[str, list[float]]] = {"engram": {}, "llama.cpp": {}}
    for turn in range(arguments.turns):
        for name, measured in [
            ("llama.cpp", theirs(llama, turn)),
            ("engram", ours(arguments.model, arguments.dtype, arguments.threads)),
        ]:
            for key in ("prefill_512", "decode_1"):
                found[name].setdefault(key, []).append(measured[key])
    for key in ("prefill_512", "decode_1"):
        mine, other = (statistics.median(found[name][key]) for name in ("engram", "llama.cpp"))
        print(f"{key}: {mine:.1f} beside {other:.1f} tokens/s, {mine / other:.2f} times")


if __name__ == "__main__":
    main()
