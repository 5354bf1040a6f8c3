"""Prefill and greedy decoding of a model of SmolLM2-135M's shape, a plain f32 loop with a key-value cache.

    python decode.py [THREADS]

The weights are random; `cargo bench -p engram-serve --bench serving -- decode` does the same in Rust.
"""

import sys
import time

import torch
import torch.nn.functional as F

VOCABULARY, WIDTH, BLOCKS, HIDDEN, CONTEXT = 49152, 576, 30, 1536, 2048
HEADS, KEY_HEADS, HEAD = 9, 3, 64

torch.set_grad_enabled(False)
torch.manual_seed(1)


def linear(inputs, outputs):
    return torch.randn(outputs, inputs) / inputs**0.5


class Block:
    def __init__(self):
        self.qkv, self.out = linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD), linear(HEADS * HEAD, WIDTH)
        self.up, self.down = linear(WIDTH, 2 * HIDDEN), linear(HIDDEN, WIDTH)
        self.norms = torch.ones(WIDTH), torch.ones(WIDTH)


EMBEDDING = 0.02 * torch.randn(VOCABULARY, WIDTH)
MODEL = [Block() for _ in range(BLOCKS)]
FREQUENCIES = 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
ANGLES = torch.outer(torch.arange(CONTEXT), FREQUENCIES)
COS, SIN = ANGLES.cos(), ANGLES.sin()


def turn(x, start):
    cos, sin = COS[start : start + x.shape[2]], SIN[start : start + x.shape[2]]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def step(tokens, start, cache):
    """Logits after the last of `tokens` [batch, time], at positions from `start`."""
    batch, time_ = tokens.shape
    x = EMBEDDING[tokens]
    for block, (keys, values) in zip(MODEL, cache):
        h = F.rms_norm(x, (WIDTH,), block.norms[0], 1e-6)
        qkv = F.linear(h, block.qkv).view(batch, time_, HEADS + 2 * KEY_HEADS, HEAD).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        end = start + time_
        keys[:, :, start:end], values[:, :, start:end] = turn(k, start), v
        y = F.scaled_dot_product_attention(
            turn(q, start), keys[:, :, :end], values[:, :, :end], is_causal=time_ > 1, enable_gqa=True
        )
        x = x + F.linear(y.transpose(1, 2).reshape(batch, time_, HEADS * HEAD), block.out)
        gate, up = F.linear(F.rms_norm(x, (WIDTH,), block.norms[1], 1e-6), block.up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, block.down)
    return F.linear(F.rms_norm(x[:, -1], (WIDTH,), torch.ones(WIDTH), 1e-6), EMBEDDING)


def cache(batch):
    return [[torch.zeros(batch, KEY_HEADS, CONTEXT, HEAD) for _ in range(2)] for _ in range(BLOCKS)]


def prefill():
    tokens, kept = torch.randint(VOCABULARY, (1, 512)), cache(1)
    start = time.perf_counter()
    step(tokens, 0, kept)
    return 512 / (time.perf_counter() - start)


def decode(batch, count=64):
    kept = cache(batch)
    token = step(torch.randint(VOCABULARY, (batch, 128)), 0, kept).argmax(-1, keepdim=True)
    start = time.perf_counter()
    for position in range(128, 128 + count - 1):
        token = step(token, position, kept).argmax(-1, keepdim=True)
    return batch * (count - 1) / (time.perf_counter() - start)


torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, f32")
print(f"  prefill, 512 tokens: {max(prefill() for _ in range(3)):.0f} tokens/s")
for batch in (1, 16):
    print(f"  decoding, {batch} at once after 128 tokens: {max(decode(batch) for _ in range(3)):.1f} tokens/s")
