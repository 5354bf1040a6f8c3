"""The language model: embedding, blocks with memory, head.

Shapes: B sequences of T tokens, N = B·T, n residual streams of width D. Matrices are [in, out], and parameters have the
names of the Rust model, so that its safetensors files load as they are.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_lm.config import LatentAttentionConfig, MemoryConfig, ModelConfig, PlainAttentionConfig
from engram_lm.torch.memory import Memory, matrix, normalise, wide
from engram_lm.torch.training import DECAYING, STEADY, Matrices, WeightTraining, of_heads, whole


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, in f32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.declared = {"weight": STEADY}
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return F.rms_norm(wide(x), self.weight.shape, self.weight, self.epsilon)


class Linear(nn.Module):
    """y = x·W with W [in, out], which holds one matrix for Muon unless `training` says something else."""

    def __init__(self, inputs: int, outputs: int, training: WeightTraining | None = None) -> None:
        super().__init__()
        self.weight = matrix(inputs, outputs)
        self.declared = {"weight": training or whole(outputs)}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return x @ self.weight


def swiglu(x: Tensor) -> Tensor:
    """silu(gate)·up, gate first."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """A SwiGLU feed-forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = Linear(width, 2 * hidden, Matrices((hidden, hidden)))
        self.output = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return cast(Tensor, self.output(swiglu(self.input(x))))


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071): i is paired with i + width/2."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, base, yarn = config.attention.rotary, config.attention.rotary_base, config.attention.yarn
        frequencies = [float(base) ** (-2 * pair / width) for pair in range(width // 2)]
        self.inverse_temperature = 1.0
        if yarn is not None:
            frequencies = yarn.frequencies(frequencies, base)
            self.inverse_temperature = yarn.inverse_temperature
        angles = torch.outer(*(torch.tensor(of, dtype=torch.float64) for of in (range(config.context), frequencies)))
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """[B, heads, T, width] to the same; `positions` [B, T], or 0, 1, 2, … of every row."""
        time = x.shape[-2]
        if positions is None:
            cos, sin = self.cos[:time], self.sin[:time]
        else:
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Sight:
    """What a token sees of its window: itself and the tokens of its sequence before it."""

    def __init__(self, positions: Tensor | None) -> None:
        self.positions = positions
        self.mask: Tensor | None = None
        if positions is not None:
            at = torch.arange(positions.shape[1], device=positions.device)
            first = at - positions  # where each token's sequence begins, [B, T]
            seen = (at <= at[:, None]) & (at >= first[..., None])  # [B, T, T]
            self.mask = seen.unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, heads, T, ·] each to [B, heads, T, value]."""
        v = v.to(q.dtype)
        if self.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scale)


class LatentAttention(nn.Module):
    """Multi-head latent attention with decoupled rotary dimensions (arXiv 2405.04434, section 2.1)."""

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        a, width, epsilon = config.attention, config.width, config.norm_epsilon
        assert isinstance(a, LatentAttentionConfig)
        self.config = a
        self.rotary = [rotary]  # in a list: its buffers are the model's
        self.scale = rotary.inverse_temperature / math.sqrt(a.content_width + a.rotary_width)
        if a.query_rank:
            self.query_down = Linear(width, a.query_rank)
            self.query_norm = RMSNorm(a.query_rank, epsilon)
        # The matrices are those of the paper: W^UQ and W^QR, W^DKV and W^KR, W^UK and W^UV.
        queries = of_heads(a.heads, a.content_width, a.rotary_width)
        self.query_up = Linear(a.query_rank or width, a.heads * (a.content_width + a.rotary_width), queries)
        latent_and_key = Matrices((a.latent_rank, a.rotary_width))
        self.latent_down = Linear(width, a.latent_rank + a.rotary_width, latent_and_key)
        self.latent_norm = RMSNorm(a.latent_rank, epsilon)
        keys_and_values = of_heads(a.heads, a.content_width, a.value_width)
        self.latent_up = Linear(a.latent_rank, a.heads * (a.content_width + a.value_width), keys_and_values)
        self.output = Linear(a.heads * a.value_width, width)

    def forward(self, x: Tensor, sight: Sight, values: Tensor | None = None) -> Tensor:
        """[B, T, D] to the same; `values` [B, T, heads·value] are added to those of the heads."""
        a, (batch, time, _) = self.config, x.shape
        (rotary,) = self.rotary

        def heads(y: Tensor, width: int) -> Tensor:
            return y.view(batch, time, a.heads, width).transpose(1, 2)

        query_latent = self.query_norm(self.query_down(x)) if a.query_rank else x
        q = heads(self.query_up(query_latent), a.content_width + a.rotary_width)
        q_content, q_rotary = q.split([a.content_width, a.rotary_width], dim=-1)
        latent, k_rotary = self.latent_down(x).split([a.latent_rank, a.rotary_width], dim=-1)
        kv = heads(self.latent_up(self.latent_norm(latent)), a.content_width + a.value_width)
        k_content, v = kv.split([a.content_width, a.value_width], dim=-1)
        if values is not None:
            v = v + heads(values, a.value_width)
        k_rotary = rotary(k_rotary.unsqueeze(1), sight.positions).expand(-1, a.heads, -1, -1)  # shared by the heads
        q = torch.cat([q_content, rotary(q_rotary, sight.positions).to(q.dtype)], dim=-1)
        k = torch.cat([k_content, k_rotary.to(k_content.dtype)], dim=-1)
        out = sight.attend(q, k, v, self.scale)
        return cast(Tensor, self.output(out.transpose(1, 2).reshape(batch, time, -1)))


class PlainAttention(nn.Module):
    """Multi-head attention with rotary positions over whole heads; successive heads may share keys and values."""

    def __init__(self, config: ModelConfig, rotary: Rotary) -> None:
        super().__init__()
        a = config.attention
        assert isinstance(a, PlainAttentionConfig)
        self.config, self.rotary = a, [rotary]
        self.key_heads = a.key_heads or a.heads
        self.scale = 1 / math.sqrt(a.head_width)
        keys = of_heads(self.key_heads, a.head_width)
        self.query = Linear(config.width, a.heads * a.head_width, of_heads(a.heads, a.head_width))
        self.key = Linear(config.width, self.key_heads * a.head_width, keys)
        self.value = Linear(config.width, self.key_heads * a.head_width, keys)
        self.output = Linear(a.heads * a.head_width, config.width)

    def forward(self, x: Tensor, sight: Sight, values: Tensor | None = None) -> Tensor:
        """[B, T, D] to the same; `values` [B, T, key_heads·head] are added to those of the heads."""
        a, (batch, time, _) = self.config, x.shape
        (rotary,) = self.rotary

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, time, count, a.head_width).transpose(1, 2)

        v = self.value(x) if values is None else self.value(x) + values
        q = rotary(heads(self.query(x), a.heads), sight.positions)
        k = rotary(heads(self.key(x), self.key_heads), sight.positions)
        group = a.heads // self.key_heads
        k, v = (y.repeat_interleave(group, dim=1) for y in (k, heads(v, self.key_heads)))
        out = sight.attend(q, k, v, self.scale)
        return cast(Tensor, self.output(out.transpose(1, 2).reshape(batch, time, -1)))


class Experts(nn.Module):
    """Routed experts beside a shared one, sigmoid scores, a balancing bias on the choice (arXiv 2408.15664)."""

    balance: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, width = config.experts, config.width
        assert e is not None
        self.active, self.rate, self.scaling = e.active, e.balance_rate, e.scaling
        self.sequence_balance = e.sequence_balance
        self.router = Linear(width, e.routed, DECAYING)
        self.register_buffer("balance", torch.zeros(e.routed))
        self.input = matrix(e.routed, width, 2 * e.width)
        self.output = matrix(e.routed, e.width, width)
        self.declared = {"input": Matrices((e.width, e.width)), "output": whole(width)}
        self.shared = FeedForward(width, e.shared_width) if e.shared_width else None
        self.loads: Tensor | None = None  # tokens that each expert saw since the last `rebalance`, [routed]

    def forward(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to the same, and the loss that balances the experts within each sequence, if it has a weight.

        `positions` [B, T]: places in their sequences, where a row holds several.
        """
        shape, x = x.shape, x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # near ties decide which expert a token sees
            scores = self.router(wide(x)).sigmoid()
        choice = (scores.detach() + self.balance).topk(self.active, dim=-1).indices  # [N, K]
        gates = scores.gather(1, choice)
        gates = gates / gates.sum(-1, keepdim=True) * self.scaling
        balance = None
        if self.sequence_balance and torch.is_grad_enabled():
            balance = self._balance_loss(scores, choice, shape[1], positions)

        # Tokens sorted by expert, a pair of products for each expert, then added where they came from.
        flat = choice.flatten()
        order = flat.argsort(stable=True)
        loads = flat.bincount(minlength=len(self.balance))
        if self.training and torch.is_grad_enabled() and not self._again:
            self.loads = loads if self.loads is None else self.loads + loads
        rows = order // self.active
        y = self._products(x.index_select(0, rows), loads)
        y = y * gates.flatten().index_select(0, order).unsqueeze(-1)
        routed = torch.zeros_like(x, dtype=y.dtype).index_add(0, rows, y)
        return (routed + self.shared(x) if self.shared is not None else routed).view(shape), balance

    def _balance_loss(self, scores: Tensor, choice: Tensor, time: int, positions: Tensor | None) -> Tensor:
        """The mean over the sequences of α·Σ_i f_i·P_i (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

        With s' the scores [N, routed] of a token divided by their sum, P_i is the mean of s'_i, and f_i the number of
        tokens that see expert i, in units of the number that each would see if all saw as many.
        """
        tokens, routed = scores.shape
        if positions is None:
            sequence = torch.arange(tokens, device=scores.device) // time
        else:
            sequence = (positions.flatten() == 0).cumsum(0) - 1
        lengths = sequence.bincount()
        count = len(lengths)
        seen = (sequence.unsqueeze(-1) * routed + choice).flatten().bincount(minlength=count * routed)
        units = lengths.double() * self.active / routed
        factors = seen.view(count, routed) / (units * lengths * count).unsqueeze(-1)
        shares = scores / scores.sum(-1, keepdim=True)
        return self.sequence_balance * (shares * factors.to(scores.dtype)[sequence]).sum()

    # Whether activation checkpointing is computing a block again, whose loads have been counted.
    _again = False

    def _products(self, tokens: Tensor, loads: Tensor) -> Tensor:
        """Tokens sorted by expert, [N·K, D], each through its expert."""
        if tokens.is_cuda:
            return self._grouped(tokens, loads)
        # unbind, not indexing: its backward pass stacks the experts' gradients once.
        experts = zip(tokens.split(loads.tolist()), self.input.unbind(), self.output.unbind(), strict=True)
        return torch.cat([swiglu(t @ w_in) @ w_out for t, w_in, w_out in experts])

    def _grouped(self, tokens: Tensor, loads: Tensor) -> Tensor:
        """The same by grouped products, which need no loads on the host."""
        ends = loads.cumsum(0).to(torch.int32)
        dtype = torch.get_autocast_dtype(tokens.device.type) if torch.is_autocast_enabled() else tokens.dtype
        hidden = swiglu(F.grouped_mm(tokens.to(dtype), self.input.to(dtype), offs=ends))
        return F.grouped_mm(hidden, self.output.to(dtype), offs=ends)

    @torch.no_grad()
    def rebalance(self) -> None:
        """Moves the bias after a step: up where an expert saw fewer tokens than the mean, down where it saw more."""
        if self.loads is not None:
            loads = self.loads.double()
            self.balance += self.rate * (loads.mean() - loads).sign().to(self.balance.dtype)
            self.loads = None


class HyperConnection(nn.Module):
    """A layer between residual streams [B, T, n, D] with doubly stochastic mixing (arXiv 2512.24880)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        assert config.hyper_connections is not None
        n = self.streams = config.streams
        self.epsilon, self.iterations = config.norm_epsilon, config.hyper_connections.sinkhorn_iterations
        self.projection = matrix(n * config.width, 2 * n + n * n)
        self.scale = nn.Parameter(torch.full((3,), 0.01))
        read = torch.full((n,), 0.3 / (n - 1))
        read[index % n] = 0.7
        mix = torch.full((n, n), -8.0).fill_diagonal_(0.0)
        self.bias = nn.Parameter(torch.cat([read.logit(), torch.zeros(n), mix.flatten()]))
        self.declared = {"projection": DECAYING, "scale": STEADY, "bias": STEADY}

    def forward(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """`layer` [B, T, D] to the same, read from the streams and written back to them."""
        n = self.streams
        with torch.autocast(x.device.type, enabled=False):
            z = normalise(x.flatten(-2), self.epsilon) @ self.projection
            parts = zip(z.split([n, n, n * n], -1), self.scale, self.bias.split([n, n, n * n]), strict=True)
            read, write, mix = (part * scale + bias for part, scale, bias in parts)
            mix = sinkhorn(mix.unflatten(-1, (n, n)), self.iterations)
            h = (read.sigmoid().unsqueeze(-2) @ x).squeeze(-2)
        y = wide(layer(h))
        with torch.autocast(x.device.type, enabled=False):
            mixed: Tensor = mix @ x + (2 * write.sigmoid()).unsqueeze(-1) * y.unsqueeze(-2)
        return mixed


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """exp, then rows and columns normalised in turn. What is added keeps every sum above 0."""
    m = (logits - logits.detach().amax(-1, keepdim=True)).exp() + 1e-26
    for _ in range(iterations):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


class NgramEmbedding(nn.Module):
    """Rows that are added without keys and gates: what a memory is compared with (docs/memory-variants.md)."""

    def __init__(self, memory: MemoryConfig, config: ModelConfig) -> None:
        super().__init__()
        self.form, self.slots = memory.form, memory.slots
        a = config.attention
        if isinstance(a, LatentAttentionConfig):
            values = a.heads * a.value_width
        else:
            values = (a.key_heads or a.heads) * a.head_width
        outputs = {"added": 0, "over_encoding": config.width, "attention_values": values}[memory.form]
        self.projection = matrix(memory.width, outputs) if outputs else None
        # An over-encoding is Σ W_s·e_s: one matrix per slot.
        stacked = memory.slots if memory.form == "over_encoding" else 1
        self.declared = {"projection": Matrices((outputs,), stacked=stacked)}

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """The streams x [B, T, n, D] with the rows e [B, T, d_mem] in them, where that is their place."""
        if self.form == "attention_values":
            return x
        x = x + self.project(e).unsqueeze(-2)
        return x / (1 + self.slots) if self.form == "over_encoding" else x

    def values(self, e: Tensor) -> Tensor | None:
        """What is added to the values of the block's attention, where that is the rows' place."""
        return self.project(e) if self.form == "attention_values" else None

    def project(self, e: Tensor) -> Tensor:
        """W·e, or the mean of the rows where there is no W."""
        if self.projection is None:
            mean: Tensor = e.unflatten(-1, (self.slots, -1)).mean(-2)
            return mean
        return e @ self.projection


class Block(nn.Module):
    """Attention, then feed-forward, each around a residual, with the memory that is read before attention."""

    def __init__(self, config: ModelConfig, index: int, rotary: Rotary) -> None:
        super().__init__()
        width, epsilon, memory = config.width, config.norm_epsilon, config.memory
        self.memory: Memory | NgramEmbedding | None = None
        if memory is not None and index in memory.layers:
            gated = memory.form in ("paper", "v41")
            self.memory = Memory(memory, config.streams, width) if gated else NgramEmbedding(memory, config)
        latent = isinstance(config.attention, LatentAttentionConfig)
        self.attention = LatentAttention(config, rotary) if latent else PlainAttention(config, rotary)
        self.attention_norm = RMSNorm(width, epsilon)
        if config.experts and index >= config.experts.first_block:
            self.feed_forward: Experts | FeedForward = Experts(config)
        else:
            self.feed_forward = FeedForward(width, config.feed_forward.width)
        self.feed_forward_norm = RMSNorm(width, epsilon)
        hyper = config.hyper_connections is not None
        self.attention_streams = HyperConnection(config, 2 * index) if hyper else None
        self.feed_forward_streams = HyperConnection(config, 2 * index + 1) if hyper else None

    def forward(self, x: Tensor, e: Tensor | None, dead: Tensor | None, sight: Sight) -> tuple[Tensor, Tensor | None]:
        """Streams [B, T, n, D] (without hyper-connections n = 1) to the same, and a loss that balances its experts."""
        values, balance = None, None
        if e is not None and isinstance(self.memory, NgramEmbedding):
            e = e if dead is None else e.masked_fill(dead[..., None], 0.0)
            x, values = self.memory(x, e), self.memory.values(e)
        elif e is not None and self.memory is not None:
            x = x + self.memory(x, e, dead, sight.positions)
        x = around(x, self.attention_streams, lambda h: self.attention(self.attention_norm(h), sight, values))

        def feed_forward(h: Tensor) -> Tensor:
            nonlocal balance
            h = self.feed_forward_norm(h)
            if isinstance(self.feed_forward, Experts):
                y, balance = self.feed_forward(h, sight.positions)
                return cast(Tensor, y)
            return cast(Tensor, self.feed_forward(h))

        return around(x, self.feed_forward_streams, feed_forward), balance


def around(x: Tensor, streams: HyperConnection | None, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """`layer` around the residual: x + layer(x), or its hyper-connected form."""
    if streams is not None:
        return cast(Tensor, streams(x, layer))
    return x + layer(x.squeeze(-2)).unsqueeze(-2)


class LanguageModel(nn.Module):
    """A transformer language model with conditional memory. The tables themselves live outside: see `RowTable`."""

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        """`recompute`: activation checkpointing, block by block.

        Weights are drawn anew by PyTorch's generator; `first_weights.initialise` gives those that the Rust trainer
        begins with, of the sizes that `[model.init]` names.
        """
        super().__init__()
        config.check()
        self.config, self.recompute = config, recompute
        self.rotary = Rotary(config)
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config, index, self.rotary) for index in range(config.blocks))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied_head else nn.Parameter(torch.randn(config.width, config.vocabulary) * 0.02)
        self.declared = {"embedding": DECAYING, "head": DECAYING}

    def hidden(
        self,
        tokens: Tensor,
        memory: Mapping[int, Tensor] | None = None,
        dead: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """States before the head, [B, T, D], of `tokens` [B, T].

        `memory`: of every block with memory, its rows e [B, T, d_mem]; without them it is as if it had none.
        `dead` bool [B, T]: positions without memory. `positions` [B, T]: places in their sequences, where a row of
        tokens holds several; none: a row is one sequence.
        """
        return self._pass(tokens, memory or {}, dead, positions)[0]

    def _pass(
        self, tokens: Tensor, memory: Mapping[int, Tensor], dead: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """States before the head, and the sum of the losses that balance experts, if there are such."""
        unknown = memory.keys() - set(self.config.memory.layers if self.config.memory else [])
        if unknown:
            raise ValueError(f"rows are given for blocks {sorted(unknown)}, which have no memory")
        x = F.embedding(tokens, self.embedding).unsqueeze(-2).repeat(1, 1, self.config.streams, 1)  # [B, T, n, D]
        sight = Sight(positions)
        balance: Tensor | None = None
        for index, block in enumerate(self.blocks):
            arguments = (x, memory.get(index), dead, sight)
            if self.recompute and torch.is_grad_enabled():
                x, of_block = checkpoint(_Counted(block), *arguments, use_reentrant=False)
            else:
                x, of_block = block(*arguments)
            if of_block is not None:
                balance = of_block if balance is None else balance + of_block
        return cast(Tensor, self.norm(x.mean(-2))), balance

    def head_weight(self) -> Tensor:
        """[D, vocabulary]"""
        return self.embedding.T if self.head is None else self.head

    def logits(
        self,
        tokens: Tensor,
        memory: Mapping[int, Tensor] | None = None,
        dead: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each, [B, T, vocabulary]; arguments as in `hidden`."""
        return self.hidden(tokens, memory, dead, positions) @ self.head_weight()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Mapping[int, Tensor] | None = None,
        dead: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` [B, T] after `tokens` [B, T]; other arguments as in `hidden`."""
        return self.losses(tokens, targets, memory, dead, positions)[0]

    def losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        memory: Mapping[int, Tensor] | None = None,
        dead: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss that `forward` gives, and the one that balances experts within each sequence, which is learned from
        beside it; none: `model.experts.sequence_balance` is 0."""
        hidden, balance = self._pass(tokens, memory or {}, dead, positions)
        logits = hidden @ self.head_weight()
        return F.cross_entropy(wide(logits.flatten(0, -2)), targets.flatten()), balance

    def experts(self) -> list[Experts]:
        """The blocks' experts, in order."""
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, Experts)]

    def rebalance(self) -> None:
        """Moves every balancing bias after a step."""
        for experts in self.experts():
            experts.rebalance()


class _Counted:
    """A block under activation checkpointing, whose second pass counts no loads."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.passes = block, 0

    def __call__(self, *arguments: object) -> tuple[Tensor, Tensor | None]:
        feed_forward = self.block.feed_forward
        self.passes += 1
        if isinstance(feed_forward, Experts):
            feed_forward._again = self.passes > 1
        try:
            return cast(tuple[Tensor, Tensor | None], self.block(*arguments))
        finally:
            if isinstance(feed_forward, Experts):
                feed_forward._again = False
