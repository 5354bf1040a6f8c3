"""Engram's language model in plain PyTorch: an independent check of the Rust one, and a yardstick for speed.

Shapes: B sequences of T tokens, N = B·T, n residual streams of width D, w values in a memory row. Weights of
linear maps are [in, out], and parameters have the names of the Rust model, so that its safetensors files load
as they are:

    python model.py --config CONFIG.toml --weights WEIGHTS.safetensors --batch BATCH.safetensors \\
        [--compare WANT.safetensors]
"""

import argparse
import math
import sys
import tomllib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# --- configuration: the [model] table -----------------------------------------------------------------------


@dataclass
class AttentionConfig:
    kind: str
    heads: int
    query_rank: int | None = None
    latent_rank: int = 0
    content_width: int = 0
    rotary_width: int = 0
    value_width: int = 0
    head_width: int = 0
    rotary_base: float = 10_000.0


@dataclass
class FeedForwardConfig:
    width: int


@dataclass
class ExpertsConfig:
    first_block: int
    routed: int
    active: int
    width: int
    shared_width: int
    balance_rate: float = 1e-3


@dataclass
class HyperConnectionConfig:
    streams: int
    sinkhorn_iterations: int = 20


@dataclass
class MemoryConfig:
    layers: list
    max_order: int
    heads: int
    row_width: int
    rows_per_head: list
    form: str = "paper"
    compression: str = "normalised"
    seed: int = 0
    pad_id: int = 0
    kernel: int = 4
    row_init: float = 0.0

    @property
    def slots(self):
        """Rows fetched per token: one per order and head."""
        return (self.max_order - 1) * self.heads

    @property
    def width(self):
        """Width of a token's rows side by side."""
        return self.slots * self.row_width


@dataclass
class ModelConfig:
    vocabulary: int
    width: int
    blocks: int
    context: int
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    norm_epsilon: float = 1e-6
    tied_head: bool = False
    experts: ExpertsConfig | None = None
    hyper_connections: HyperConnectionConfig | None = None
    memory: MemoryConfig | None = None

    def __post_init__(self):
        tables = {
            "attention": AttentionConfig,
            "feed_forward": FeedForwardConfig,
            "experts": ExpertsConfig,
            "hyper_connections": HyperConnectionConfig,
            "memory": MemoryConfig,
        }
        for name, kind in tables.items():
            if isinstance(getattr(self, name), dict):
                setattr(self, name, kind(**getattr(self, name)))

    @classmethod
    def load(cls, path):
        """Reads the [model] table of a TOML file; unknown and missing keys are errors."""
        with open(path, "rb") as file:
            return cls(**tomllib.load(file)["model"])

    @property
    def streams(self):
        return self.hyper_connections.streams if self.hyper_connections else 1

    @property
    def output_scale(self):
        """Scale of the weights that write to the residual: each block writes twice."""
        return 1 / math.sqrt(2 * self.blocks)


# --- layers -------------------------------------------------------------------------------------------------


def weight(*shape, std):
    """A matrix of normal values; a stack of matrices when `shape` has three dimensions."""
    return nn.Parameter(torch.randn(*shape) * std)


class Linear(nn.Module):
    """y = x·W with W [in, out]."""

    def __init__(self, inputs, outputs, scale=1.0):
        super().__init__()
        self.weight = weight(inputs, outputs, std=scale / math.sqrt(inputs))

    def forward(self, x):
        return x @ self.weight


def normalise(x, epsilon):
    """x / √(mean(x²) + ε) over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def swiglu(x):
    """silu(gate)·up, gate first."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    def __init__(self, width, hidden, scale):
        super().__init__()
        self.input = Linear(width, 2 * hidden)
        self.output = Linear(hidden, width, scale)

    def forward(self, x):
        return self.output(swiglu(self.input(x)))


class Rotary(nn.Module):
    """Rotary positions: dimension i is paired with i + width/2 (arXiv 2104.09864)."""

    def __init__(self, width, base, context):
        super().__init__()
        frequencies = float(base) ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x):
        """[B, heads, T, width] to the same."""
        time = x.shape[-2]
        cos, sin = self.cos[:time], self.sin[:time]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class LatentAttention(nn.Module):
    """Multi-head latent attention with decoupled rotary dimensions (arXiv 2405.04434, section 2.1)."""

    def __init__(self, config, rotary):
        super().__init__()
        a, width, epsilon = config.attention, config.width, config.norm_epsilon
        self.config, self.rotary = a, rotary
        if a.query_rank:
            self.query_down = Linear(width, a.query_rank)
            self.query_norm = nn.RMSNorm(a.query_rank, epsilon)
        self.query_up = Linear(a.query_rank or width, a.heads * (a.content_width + a.rotary_width))
        self.latent_down = Linear(width, a.latent_rank + a.rotary_width)
        self.latent_norm = nn.RMSNorm(a.latent_rank, epsilon)
        self.latent_up = Linear(a.latent_rank, a.heads * (a.content_width + a.value_width))
        self.output = Linear(a.heads * a.value_width, width, config.output_scale)

    def forward(self, x):
        """[B, T, D] to the same."""
        a, (batch, time, _) = self.config, x.shape

        def heads(y, width):
            return y.view(batch, time, a.heads, width).transpose(1, 2)

        query_latent = self.query_norm(self.query_down(x)) if a.query_rank else x
        q = heads(self.query_up(query_latent), a.content_width + a.rotary_width)
        q_content, q_rotary = q.split([a.content_width, a.rotary_width], dim=-1)
        latent, k_rotary = self.latent_down(x).split([a.latent_rank, a.rotary_width], dim=-1)
        kv = heads(self.latent_up(self.latent_norm(latent)), a.content_width + a.value_width)
        k_content, v = kv.split([a.content_width, a.value_width], dim=-1)
        k_rotary = self.rotary(k_rotary.unsqueeze(1)).expand(-1, a.heads, -1, -1)  # one key for all heads
        q = torch.cat([q_content, self.rotary(q_rotary)], dim=-1)
        k = torch.cat([k_content, k_rotary], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scale: 1/√(content + rotary)
        return self.output(out.transpose(1, 2).reshape(batch, time, -1))


class PlainAttention(nn.Module):
    def __init__(self, config, rotary):
        super().__init__()
        self.config, self.rotary = config.attention, rotary
        inner = config.attention.heads * config.attention.head_width
        self.query, self.key, self.value = (Linear(config.width, inner) for _ in range(3))
        self.output = Linear(inner, config.width, config.output_scale)

    def forward(self, x):
        batch, time, _ = x.shape
        shape = (batch, time, self.config.heads, self.config.head_width)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True)
        return self.output(out.transpose(1, 2).reshape(batch, time, -1))


class Experts(nn.Module):
    """Routed experts and a shared one, sigmoid scores, a balancing bias on the choice (arXiv 2408.15664)."""

    def __init__(self, config):
        super().__init__()
        e, width = config.experts, config.width
        self.active, self.rate = e.active, e.balance_rate
        self.router = Linear(width, e.routed)
        self.register_buffer("balance", torch.zeros(e.routed))
        self.input = weight(e.routed, width, 2 * e.width, std=1 / math.sqrt(width))
        self.output = weight(e.routed, e.width, width, std=config.output_scale / math.sqrt(e.width))
        self.shared = FeedForward(width, e.shared_width, config.output_scale) if e.shared_width else None
        self.loads = None

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)
        scores = self.router(x).sigmoid()
        choice = (scores.detach() + self.balance).topk(self.active, dim=-1).indices  # [N, K]
        gates = scores.gather(1, choice)
        gates = gates / gates.sum(-1, keepdim=True)

        # Tokens sorted by expert, one pair of products for each expert, then added where they came from.
        flat = choice.flatten()
        order = flat.argsort(stable=True)
        self.loads = flat.bincount(minlength=len(self.balance))
        rows = order // self.active
        tokens = x.index_select(0, rows).split(self.loads.tolist())
        # unbind, not indexing: its backward pass stacks the experts' gradients once.
        experts = zip(tokens, self.input.unbind(), self.output.unbind())
        y = torch.cat([swiglu(t @ w_in) @ w_out for t, w_in, w_out in experts])
        y = y * gates.flatten().index_select(0, order).unsqueeze(-1)
        routed = torch.zeros_like(x).index_add(0, rows, y)
        return (routed + self.shared(x) if self.shared else routed).view(shape)

    @torch.no_grad()
    def rebalance(self):
        loads = self.loads.float()
        self.balance += self.rate * (loads.mean() - loads).sign()


class HyperConnection(nn.Module):
    """A layer between residual streams [B, T, n, D] with doubly stochastic mixing (arXiv 2512.24880)."""

    def __init__(self, config, index):
        super().__init__()
        n = config.streams
        self.streams, self.epsilon = n, config.norm_epsilon
        self.iterations = config.hyper_connections.sinkhorn_iterations
        self.projection = weight(n * config.width, 2 * n + n * n, std=1 / math.sqrt(n * config.width))
        self.scale = nn.Parameter(torch.full((3,), 0.01))
        read = torch.full((n,), 0.3 / (n - 1))
        read[index % n] = 0.7
        mix = torch.full((n, n), -8.0).fill_diagonal_(0.0)
        self.bias = nn.Parameter(torch.cat([read.logit(), torch.zeros(n), mix.flatten()]))

    def forward(self, x, layer):
        n = self.streams
        z = normalise(x.flatten(-2), self.epsilon) @ self.projection
        parts = zip(z.split([n, n, n * n], -1), self.scale, self.bias.split([n, n, n * n]))
        read, write, mix = (part * scale + bias for part, scale, bias in parts)
        mix = sinkhorn(mix.unflatten(-1, (n, n)), self.iterations)
        y = layer((read.sigmoid().unsqueeze(-2) @ x).squeeze(-2))
        return mix @ x + (2 * write.sigmoid()).unsqueeze(-1) * y.unsqueeze(-2)


def sinkhorn(logits, iterations):
    """exp, then rows and columns normalised in turn."""
    m = (logits - logits.detach().amax((-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


class Projection(nn.Module):
    """Keys of all streams and one value, each with a bias (the paper's form)."""

    def __init__(self, inputs, streams, width):
        super().__init__()
        self.key = weight(inputs, streams * width, std=1 / math.sqrt(inputs))
        self.key_bias = nn.Parameter(torch.zeros(streams * width))
        self.value = weight(inputs, width, std=1 / math.sqrt(inputs))
        self.value_bias = nn.Parameter(torch.zeros(width))

    def forward(self, e):
        key = torch.addmm(self.key_bias, e.flatten(0, -2), self.key)
        value = torch.addmm(self.value_bias, e.flatten(0, -2), self.value)
        return key.unflatten(0, e.shape[:-1]), value.unflatten(0, e.shape[:-1])


class GateNorms(nn.Module):
    def __init__(self, streams, width, key):
        super().__init__()
        self.query = nn.Parameter(torch.ones(streams, width))
        self.key = nn.Parameter(torch.ones(streams, width)) if key else None


class ShortConvolution(nn.Module):
    """u + SiLU(conv(RMSNorm(u))): causal, depthwise over time, dilated by the longest n-gram."""

    def __init__(self, streams, width, kernel, dilation):
        super().__init__()
        self.dilation = dilation
        self.norm = nn.Parameter(torch.ones(streams, width))
        self.weight = nn.Parameter(torch.zeros(streams, width, kernel))

    def forward(self, u):
        time, kernel = u.shape[1], self.weight.shape[-1]
        reach = (kernel - 1) * self.dilation
        padded = F.pad(normalise(u, 1e-5) * self.norm, (0, 0, 0, 0, reach, 0))
        # Shifted sums: on CPU faster than F.conv1d with groups.
        starts = (tap * self.dilation for tap in range(kernel))
        taps = (padded[:, s : s + time] * w for s, w in zip(starts, self.weight.unbind(-1)))
        return u + F.silu(sum(taps))


class Memory(nn.Module):
    """Rows of the n-gram tables, gated by context, into the streams (arXiv 2601.07372, section 2.3)."""

    def __init__(self, config):
        super().__init__()
        memory, n, width = config.memory, config.streams, config.width
        self.streams, self.width, self.paper = n, width, memory.form == "paper"
        self.epsilon = torch.finfo(torch.float32).eps if self.paper else 1e-20
        if self.paper:
            self.projection = Projection(memory.width, n, width)
            self.convolution = ShortConvolution(n, width, memory.kernel, memory.max_order)
        else:
            self.projection = weight(memory.width, (n + 1) * width, std=1 / math.sqrt(memory.width))
        self.norms = GateNorms(n, width, key=self.paper)

    def forward(self, h, e, dead=None):
        """What is added to streams h [B, T, n, D], given rows e [B, T, d_mem]."""
        if self.paper:
            key, value = self.projection(e)
        else:
            key, value = (e @ self.projection).split([self.streams * self.width, self.width], dim=-1)
        query = normalise(h, self.epsilon) * self.norms.query
        key = normalise(key.unflatten(-1, (self.streams, self.width)), self.epsilon)
        if self.norms.key is not None:
            key = key * self.norms.key
        s = (query * key).sum(-1, keepdim=True) / math.sqrt(self.width)
        gate = (s.sign() * s.abs().clamp_min(1e-6).sqrt()).sigmoid()
        u = gate * value.unsqueeze(-2)
        if dead is not None:
            u = u.masked_fill(dead[:, :, None, None], 0.0)
        return self.convolution(u) if self.paper else u


class Block(nn.Module):
    def __init__(self, config, index, rotary):
        super().__init__()
        width, epsilon = config.width, config.norm_epsilon
        has_memory = config.memory is not None and index in config.memory.layers
        self.memory = Memory(config) if has_memory else None
        attention = {"latent": LatentAttention, "plain": PlainAttention}[config.attention.kind]
        self.attention = attention(config, rotary)
        self.attention_norm = nn.RMSNorm(width, epsilon)
        if config.experts and index >= config.experts.first_block:
            self.feed_forward = Experts(config)
        else:
            self.feed_forward = FeedForward(width, config.feed_forward.width, config.output_scale)
        self.feed_forward_norm = nn.RMSNorm(width, epsilon)
        hyper = config.hyper_connections is not None
        self.attention_streams = HyperConnection(config, 2 * index) if hyper else None
        self.feed_forward_streams = HyperConnection(config, 2 * index + 1) if hyper else None

    def forward(self, x, e=None, dead=None):
        """Streams [B, T, n, D] (without hyper-connections n = 1) to the same."""
        if self.memory is not None:
            x = x + self.memory(x, e, dead)
        x = around(x, self.attention_streams, lambda h: self.attention(self.attention_norm(h)))
        return around(x, self.feed_forward_streams, lambda h: self.feed_forward(self.feed_forward_norm(h)))


def around(x, streams, layer):
    return x + layer(x.squeeze(-2)).unsqueeze(-2) if streams is None else streams(x, layer)


class LanguageModel(nn.Module):
    """`memory` maps a memory layer to its rows [B, T, d_mem]: the tables themselves live outside."""

    def __init__(self, config):
        super().__init__()
        a = config.attention
        rotary_width = a.rotary_width if a.kind == "latent" else a.head_width
        rotary = Rotary(rotary_width, a.rotary_base, config.context)
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config, index, rotary) for index in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied_head else weight(config.width, config.vocabulary, std=0.02)

    def forward(self, tokens, targets, memory, dead=None):
        """Mean cross-entropy in nats of `targets` [B, T] after `tokens` [B, T]."""
        x = self.embedding(tokens).unsqueeze(-2).repeat(1, 1, self.config.streams, 1)  # [B, T, n, D]
        for index, block in enumerate(self.blocks):
            x = block(x, memory.get(index), dead)
        hidden = self.norm(x.mean(-2))
        head = self.embedding.weight.T if self.head is None else self.head
        return F.cross_entropy((hidden @ head).flatten(0, 1), targets.flatten())

    def rebalance(self):
        for block in self.blocks:
            if isinstance(block.feed_forward, Experts):
                block.feed_forward.rebalance()


# --- exchange with the Rust model ---------------------------------------------------------------------------

VARIANTS = {"Latent", "Plain", "Dense", "Experts", "Separate", "Fused"}


def our_name(name):
    """The name here of a Rust parameter: there, enum variants may stand in the path."""
    name = ".".join(part for part in name.split(".") if part not in VARIANTS)
    return {"embedding": "embedding.weight"}.get(name, name)


def is_batch(name):
    return name in ("tokens", "targets", "loss", "dead") or name.startswith(("memory.", "grad."))


def load_weights(model, tensors):
    """Every parameter of the model and nothing else must be there."""
    state = {our_name(name): tensor for name, tensor in tensors.items() if not is_batch(name)}
    model.load_state_dict(state, strict=True)


def evaluate(model, batch):
    """Loss and the gradients of every parameter and of each memory layer's distinct rows, by name."""
    rows, memory = {}, {}
    dtype = next(model.parameters()).dtype
    tokens, targets = batch["tokens"].long(), batch["targets"].long()
    if tokens.dim() != 2:
        sys.exit(f"`tokens` has {tokens.dim()} dimensions: wanted [batch, time]")
    for layer in model.config.memory.layers if model.config.memory else []:
        leaf = batch[f"memory.{layer}.rows"].to(dtype).requires_grad_()
        index = batch[f"memory.{layer}.index"].long()
        memory[layer] = F.embedding(index.view(*tokens.shape, -1), leaf).flatten(-2)
        rows[f"memory.{layer}.rows"] = leaf
    dead = batch["dead"].bool().view(tokens.shape) if "dead" in batch else None
    loss = model(tokens, targets.view(tokens.shape), memory, dead)
    loss.backward()
    named = rows | dict(model.named_parameters())
    return loss.item(), {name: value.grad for name, value in named.items()}


def compare(loss, gradients, want, tolerance):
    """Prints the largest error of each tensor, also as a share of its largest value; counts the misses."""
    wanted = {name: value for name, value in want.items() if name.startswith("grad.")}
    wanted = {our_name(name.removeprefix("grad.")): value for name, value in wanted.items()}
    if "loss" in want:
        wanted["loss"] = want["loss"].double().reshape(())
        gradients = {"loss": torch.tensor(loss, dtype=torch.float64)} | gradients
    misses = 0
    print(f"{'tensor':<56}{'largest':>11}{'absolute':>11}{'relative':>11}")
    for name, got in gradients.items():
        if name not in wanted:
            print(f"{name:<56}{'missing in the file':>33}  MISS")
            misses += 1
            continue
        expected = wanted.pop(name).double()
        got = torch.zeros_like(expected) if got is None else got.double()
        if got.shape != expected.shape:
            print(f"{name:<56}{f'{list(expected.shape)}, not {list(got.shape)}':>33}  MISS")
            misses += 1
            continue
        largest, error = expected.abs().max().item(), (got - expected).abs().max().item()
        relative = error / largest if largest > 0 else (0.0 if error == 0 else math.inf)
        miss = not (error <= 1e-9 or relative <= tolerance)  # also where anything is NaN
        misses += miss
        print(f"{name:<56}{largest:>11.3e}{error:>11.3e}{relative:>11.3e}{'  MISS' if miss else ''}")
    for name in wanted:
        print(f"{name:<56}{'unknown to this model':>33}  MISS")
        misses += 1
    return misses


def main():
    parser = argparse.ArgumentParser(description="Evaluates a batch and checks its gradients.")
    parser.add_argument("--config", required=True, help="TOML file with a [model] table")
    parser.add_argument("--weights", required=True, help="safetensors file of the model's weights")
    parser.add_argument("--batch", help="safetensors file of the batch, unless it is in another")
    parser.add_argument("--compare", help="safetensors file with `loss` and `grad.<parameter>`")
    parser.add_argument("--save", help="write `loss` and `grad.<parameter>` here")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="share of a tensor's largest value")
    parser.add_argument("--double", action="store_true", help="compute in f64")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    from safetensors.torch import load_file, save_file

    torch.set_num_threads(args.threads)
    weights = load_file(args.weights)
    want = load_file(args.compare) if args.compare else {}
    batch = weights | want | (load_file(args.batch) if args.batch else {})
    model = LanguageModel(ModelConfig.load(args.config))
    load_weights(model, weights)
    if args.double:
        model.double()
    loss, gradients = evaluate(model, batch)
    print(f"loss {loss:.7f}")
    if args.save:
        kept = {f"grad.{name}": g for name, g in gradients.items() if g is not None}
        save_file(kept | {"loss": torch.tensor([loss])}, args.save)
    if args.compare:
        misses = compare(loss, gradients, want, args.tolerance)
        print(f"{misses} of {len(gradients) + 1} tensors missed" if misses else "all tensors agree")
        sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
