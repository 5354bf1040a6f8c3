"""A small corpus of token shards and a configuration, without any other program."""

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm._core import blake3_of, blake3_of_file

VOCABULARY = 64


def tokenizer_json() -> str:
    """A byte-level tokenizer of 64 tokens: end-of-text, padding, and 62 texts of which some differ in case only."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [chr(c) for c in range(ord("A"), ord("Z") + 1)]
    texts = ["<|endoftext|>", "<|pad|>", *letters, *"0123456789"]
    assert len(texts) == VOCABULARY
    added = [
        {
            "id": index,
            "content": texts[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in range(2)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: index for index, text in enumerate(texts)},
        "merges": [],
    }
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return json.dumps(
        {**parts, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}
    )


def write_split(folder: Path, tokens: np.ndarray, tokenizer: Path, shards: int = 1) -> None:
    """Token shards of `tokens`, whose documents end with 0, as `engram data prepare` writes them."""
    folder.mkdir(parents=True)
    ends = np.flatnonzero(tokens == 0) + 1
    cuts = [0, *(int(ends[len(ends) * k // shards - 1]) for k in range(1, shards)), len(tokens)]
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        part = tokens[first:last].astype("<u2")
        starts = [0, *(int(e) - first for e in ends if first < e < last)]
        body = part.tobytes()
        body += bytes(-(160 + len(body)) % 8)
        body += b"".join(struct.pack("<QQ", start, 3) for start in starts)
        head = b"ENGRTOKS" + struct.pack("<4I", 1, 2, number, shards)
        head += struct.pack("<4Q2I", VOCABULARY, len(part), len(starts), 3 * len(starts), 0, 0)
        head += bytes.fromhex(blake3_of_file(tokenizer)) + bytes.fromhex(blake3_of(body))
        (folder / f"{number:05}.tokens").write_bytes(head + bytes.fromhex(blake3_of(head)) + body)


def write_corpus(folder: Path) -> None:
    """`train`, `valid` and `tokenizer.json`: documents of a second-order Markov chain, which a memory can learn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    random = np.random.default_rng(0)
    # Some tokens are frequent, which is learned first.
    successors = 2 + ((VOCABULARY - 2) * random.random((VOCABULARY, VOCABULARY, 2)) ** 3).astype(int)

    def text(count: int) -> np.ndarray:
        tokens = [2, 3]
        while len(tokens) < count:
            token = successors[tokens[-2], tokens[-1], random.integers(0, 2)]
            tokens.append(0 if random.random() < 0.02 else int(token))
        return np.array([*tokens, 0])

    write_split(folder / "train", text(20_000), folder / "tokenizer.json", shards=3)
    write_split(folder / "valid", text(1_500), folder / "tokenizer.json")


CONFIG = """
[model]
vocabulary = 64
width = 32
blocks = 2
context = 24

[model.attention]
kind = "latent"
heads = 2
latent_rank = 16
content_width = 8
rotary_width = 8
value_width = 8

[model.feed_forward]
width = 48

[model.experts]
first_block = 1
routed = 4
active = 2
width = 16
shared_width = 16

[model.hyper_connections]
streams = 2

[model.memory]
layers = [0, 1]
max_order = 3
heads = 2
row_width = 8
rows_per_head = [200, 300]
pad_id = 1
row_init = 0.02

[data]
train = "train"
valid = "valid"
tokenizer = "tokenizer.json"

[train]
steps = 12
batch = 8
schedule = { warmup = 3, decay = { wsd = { fraction = 0.4, shape = "linear", floor = 0.05 } } }
evaluate_every = 6
checkpoint_every = 5
evaluate_tokens = 600

[train.optimizer]
muon_rate = 0.01
adam_rate = 0.01
"""


def write_run(folder: Path, *changes: tuple[str, str]) -> Path:
    """A corpus in `folder` and its configuration with `changes`; gives the configuration's path."""
    if not (folder / "train").exists():
        write_corpus(folder)
    text = CONFIG
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    number = len(list(folder.glob("config*.toml")))
    path = folder / f"config{number}.toml"
    path.write_text(text)
    return path
