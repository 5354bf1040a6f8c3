"""Token shards and the order in which training goes through them: the same as the Rust trainer's.

A corpus prepared by `engram data prepare` is a folder of `.tokens` files, mapped here. Any window of any epoch is known
from a few numbers, so that the state of a sampler is two of them.
"""

import json
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_lm._core import DamagedError, FormatError, blake3_of, blake3_of_file

HEADER = 160
MASK = 2**64 - 1


@dataclass(frozen=True)
class _Shard:
    path: Path
    tokens: "NDArray[np.uint16] | NDArray[np.uint32]"
    number: int
    count: int
    vocabulary: int
    end_of_text: int
    tokenizer: str
    head: bytes


class TokenShards:
    """The tokens of one split of a corpus, over all its shards, as one sequence."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the folder of a split (or one shard) and checks headers and lengths.

        Raises `FormatError` or `DamagedError` naming the file.
        """
        folder = Path(path)
        files = sorted(folder.glob("*.tokens")) if folder.is_dir() else [folder]
        if not files:
            raise FormatError(f"{folder}: no .tokens file; name the folder of one split (train or valid)")
        self.shards = sorted((_open(file) for file in files), key=lambda shard: shard.number)
        first = self.shards[0]
        for number, shard in enumerate(self.shards):
            if (shard.tokenizer, shard.end_of_text) != (first.tokenizer, first.end_of_text):
                raise FormatError(f"{shard.path}: belongs to another preparation than the shards beside it")
            if folder.is_dir() and (shard.number != number or shard.count != len(self.shards)):
                raise FormatError(f"{folder}: has {len(self.shards)} of {first.count} shards")
        self.starts = np.cumsum([0, *(len(shard.tokens) for shard in self.shards)])
        self.vocabulary, self.end_of_text, self.tokenizer = first.vocabulary, first.end_of_text, first.tokenizer

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def identity(self) -> str:
        """What tells these tokens from others; a checkpoint keeps it beside the position in them."""
        return blake3_of(b"".join(shard.head for shard in self.shards))

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """`count` tokens from `start` on."""
        if start < 0 or start + count > len(self):
            raise ValueError(f"{count} tokens from {start} on go beyond the {len(self)} tokens")
        parts, position = [], start
        while position < start + count:
            index = int(np.searchsorted(self.starts, position, side="right")) - 1
            end = min(start + count, int(self.starts[index + 1]))
            offset = int(self.starts[index])
            parts.append(self.shards[index].tokens[position - offset : end - offset])
            position = end
        tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
        if len(tokens) and tokens.max() >= self.vocabulary:
            raise DamagedError(f"token {tokens.max()} is outside the vocabulary of {self.vocabulary}: damaged shards")
        return tokens

    def check_tokenizer(self, path: str | os.PathLike[str]) -> None:
        """Raises `ValueError` unless the tokens were made with the tokenizer at `path`."""
        if blake3_of_file(path) != self.tokenizer:
            raise ValueError(f"{self.shards[0].path.parent}: made with another tokenizer than {path}")


def _open(path: Path) -> _Shard:
    with open(path, "rb") as file:
        head = file.read(HEADER)
        if len(head) < HEADER or head[:8] != b"ENGRTOKS":
            raise FormatError(f"{path}: is not a token shard: it does not start with ENGRTOKS")
        version, width, number, count, vocabulary, tokens, documents, _, end, _ = struct.unpack_from("<4I4QII", head, 8)
        if version == 2:
            raise FormatError(f"{path}: has a loss mask (version 2 of the format), which only `engram train` applies")
        if version != 1:
            raise FormatError(f"{path}: has version {version} of the format; this program reads version 1")
        if blake3_of(head[:128]) != head[128:].hex():
            raise DamagedError(f"{path}: its header does not match its checksum; prepare the data again")
        expected = -(-(HEADER + tokens * width) // 8) * 8 + 16 * documents
        found = path.stat().st_size
        if found != expected:
            raise DamagedError(f"{path}: has {found} bytes instead of {expected}: it is cut off or damaged")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    kind: Any = {2: "<u2", 4: "<u4"}[width]
    values = np.frombuffer(mapped, kind, tokens, HEADER)
    return _Shard(path, values, number, count, vocabulary, end, head[64:96].hex(), head)


def mix(value: int) -> int:
    """A bijective mixing of 64 bits (the finaliser of SplitMix64, with its increment)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


class Sampler:
    """Training windows in a random order that is a formula, without replacement within an epoch."""

    def __init__(self, seed: int, context: int, batch: int, tokens: int, epoch: int = 0, position: int = 0) -> None:
        """Over `tokens` tokens, in windows of `context` + 1; `epoch` and `position` are the state to continue from.

        Raises `ValueError` if there is no window, or the epoch has not so many.
        """
        if not 0 < context < tokens or batch < 1:
            raise ValueError(f"{tokens} tokens have no batch of {batch} windows of {context} + 1 tokens")
        self.seed, self.context, self.batch, self.tokens = seed, context, batch, tokens
        self.epoch, self.position = epoch, position
        if position > self.windows(epoch):
            raise ValueError(f"epoch {epoch} has {self.windows(epoch)} windows, not {position}: of other data")

    @property
    def state(self) -> dict[str, int]:
        """Where it is: what a checkpoint keeps."""
        return {"epoch": self.epoch, "position": self.position}

    @property
    def epochs(self) -> float:
        """How often the data have been used: whole epochs, and the share of this one."""
        return self.epoch + self.position / self.windows(self.epoch)

    def windows(self, epoch: int) -> int:
        """Number of windows of an epoch."""
        return (self.tokens - 1 - self._offset(epoch)) // self.context

    def next_starts(self) -> list[int]:
        """Positions of the first tokens of the next batch's windows."""
        return [self._next() for _ in range(self.batch)]

    def _next(self) -> int:
        if self.position == self.windows(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        window = permute(self.position, self.windows(self.epoch), mix(self.seed ^ mix(self.epoch)))
        self.position += 1
        return self._offset(self.epoch) + window * self.context

    def _offset(self, epoch: int) -> int:
        """The epoch's first window starts here; there is always room for one window after it."""
        choices = min(self.context, self.tokens - self.context)
        return mix(mix(self.seed ^ mix(epoch)) ^ 0x6F6666736574) % choices


def permute(index: int, count: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of 0..count: a Feistel network, again until inside."""
    half = max(-(-(count - 1).bit_length() // 2), 1)
    low = (1 << half) - 1
    image = index
    while True:
        left, right = image >> half, image & low
        for number in range(6):
            left, right = right, left ^ (mix(key ^ mix(right ^ number << 40)) & low)
        image = left << half | right
        if image < count:
            return image


def positions_of(tokens: NDArray[np.int64], end_of_text: int) -> NDArray[np.int64]:
    """Places in their documents, [B, T]: an end-of-text token is the first of the document that follows it."""
    at = np.arange(tokens.shape[1])
    first = np.where((tokens == end_of_text) & (at > 0), at, 0)
    return at - np.maximum.accumulate(first, axis=1)


def stretches(context: int, limit: int | None, tokens: int) -> list[tuple[int, int]]:
    """Where held-out losses are taken in `tokens` tokens: the first input and the predicted tokens of each window.

    Windows follow each other and do not overlap. With a `limit` of predicted tokens that is below all, they are whole
    ones, spread evenly over the text. Raises `ValueError` if there is nothing to predict.
    """
    every = tokens - 1
    limit = every if limit is None else min(limit, every)
    if limit < 1:
        raise ValueError("the held-out text has no token to predict")
    windows = every // context
    if limit == every or windows == 0:
        return [(start, min(context, limit - start)) for start in range(0, limit, context)]
    # Each stands in the middle of its share of the text.
    count = max(limit // context, 1)
    return [((2 * i + 1) * windows // (2 * count) * context, min(context, limit)) for i in range(count)]


def token_bytes(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Bytes of text that each token of the `tokenizer.json` at `path` stands for, [vocabulary]; 0 for special ones."""
    tokenizer = json.loads(Path(path).read_text(encoding="utf-8"))
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    vocabulary = model["vocab"]
    named = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
    pairs: list[tuple[str, int]] = [(str(text), int(token)) for text, token in named]
    size = max([token for _, token in pairs] + [entry["id"] for entry in added]) + 1
    byte_level = "ByteLevel" in json.dumps([tokenizer.get("decoder"), tokenizer.get("pre_tokenizer")])
    lengths = np.zeros(size, np.int64)
    for text, token in pairs:
        if byte_level:
            lengths[token] = len(text)  # one character of the vocabulary for each byte
        elif text.startswith("<0x") and text.endswith(">"):
            lengths[token] = 1
        else:
            lengths[token] = len(text.replace("▁", " ").encode())
    for entry in added:
        lengths[entry["id"]] = 0 if entry["special"] else len(entry["content"].encode())
    return lengths
