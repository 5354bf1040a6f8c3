"""The Engram module: rows of the n-gram tables, gated by context, into the residual streams.

Shapes: B sequences of T tokens, M residual streams of width D, G gates a token (M, 1 or none), d_mem values of
a token's rows side by side. Matrices are [in, out]; parameters have the names that the Rust model gives them.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.config import MemoryConfig
from engram_lm.torch.training import STEADY, Matrices, WeightTraining, whole

PAPER_GATE_EPSILON = torch.finfo(torch.float32).eps  # in the gate's norms of the demonstration code
V41_GATE_EPSILON = 1e-20
CONVOLUTION_EPSILON = 1e-5


def wide(x: Tensor) -> Tensor:
    """Floats of 16 bits as f32, others as they are: what sums and norms are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normalise(x: Tensor, epsilon: float) -> Tensor:
    """x / √(mean(x²) + ε) over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def matrix(*shape: int) -> nn.Parameter:
    """A matrix, or a stack of them, of normal values scaled to its inputs."""
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-2]))


class SeparateProjection(nn.Module):
    """Keys of all gates and one value, each with a bias (the paper's form)."""

    def __init__(self, inputs: int, gates: int, width: int) -> None:
        super().__init__()
        self.key = matrix(inputs, gates * width)
        self.key_bias = nn.Parameter(torch.zeros(gates * width))
        self.value = matrix(inputs, width)
        self.value_bias = nn.Parameter(torch.zeros(width))
        # Every gate's W_K is a matrix of its own, as is W_V (section 2.3).
        keys = Matrices((width,) * gates)
        self.declared = {"key": keys, "key_bias": STEADY, "value": whole(width), "value_bias": STEADY}

    def forward(self, e: Tensor) -> tuple[Tensor | None, Tensor]:
        """e [B, T, d_mem] to keys [B, T, G·D] and the value [B, T, D]."""
        flat = e.flatten(0, -2)
        key = torch.addmm(self.key_bias, flat, self.key).unflatten(0, e.shape[:-1])
        return key, torch.addmm(self.value_bias, flat, self.value).unflatten(0, e.shape[:-1])


class ValueProjection(nn.Module):
    """The paper's form without keys, where there is no gate."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.value = matrix(inputs, width)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.declared = {"value": whole(width), "value_bias": STEADY}

    def forward(self, e: Tensor) -> tuple[Tensor | None, Tensor]:
        """e [B, T, d_mem] to no keys and the value [B, T, D]."""
        return None, e @ self.value + self.value_bias


class GateNorms(nn.Module):
    """Weights of the norms of queries and keys, [G, D]. V4.1 keeps only their product, in `query`."""

    def __init__(self, gates: int, width: int, key: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(gates, width))
        self.key = nn.Parameter(torch.ones(gates, width)) if key else None
        self.declared = {"query": STEADY, "key": STEADY}


class ShortConvolution(nn.Module):
    """u + SiLU(conv(RMSNorm(u))): causal, depthwise over time, dilated by the longest n-gram, zero at the start."""

    def __init__(self, streams: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.norm = nn.Parameter(torch.ones(streams, width))
        self.weight = nn.Parameter(torch.zeros(streams, width, kernel))  # the last tap at the token itself
        self.declared = {"norm": STEADY, "weight": STEADY}

    def forward(self, u: Tensor, positions: Tensor | None = None) -> Tensor:
        """[B, T, M, D] to the same. `positions` [B, T]: places in their sequences, where a window holds several."""
        time, kernel = u.shape[1], self.weight.shape[-1]
        normed = normalise(u, CONVOLUTION_EPSILON) * self.norm
        padded = F.pad(normed, (0, 0, 0, 0, (kernel - 1) * self.dilation, 0))
        # Shifted sums: on CPU faster than F.conv1d with groups.
        sums = u.new_zeros(())
        for tap, weight in enumerate(self.weight.unbind(-1)):
            shifted = padded[:, tap * self.dilation :][:, :time]
            if positions is not None:
                reach = (kernel - 1 - tap) * self.dilation
                shifted = shifted * (positions >= reach)[..., None, None]
            sums = sums + shifted * weight
        return u + F.silu(sums)


class Memory(nn.Module):
    """Reads one layer's memory into the residual streams (arXiv 2601.07372, section 2.3).

    For every stream m: k_m = W_K[m]·e, one value v = W_V·e for all, the gate a_m = σ(sign(s)·√|s|) of
    s = ⟨RMSNorm(h_m), RMSNorm(k_m)⟩/√D, and u_m = a_m·v. The paper's form adds a short convolution. With the gate
    form "sigmoid", a_m = σ(⟨h_m, k_m⟩/√D).
    """

    declared: dict[str, WeightTraining]

    def __init__(self, config: MemoryConfig, streams: int, width: int) -> None:
        """A module for `streams` streams of `width`; `config.form` must be "paper" or "v41"."""
        super().__init__()
        if config.form not in ("paper", "v41"):
            raise ValueError(f'`form` is {config.form!r}, but only "paper" and "v41" have a memory module')
        paper = config.form == "paper"
        self.streams, self.width, self.memory_width = streams, width, config.width
        self.gates = {"per_stream": streams, "shared": 1, "none": 0}[config.gate]
        self.epsilon = PAPER_GATE_EPSILON if paper else V41_GATE_EPSILON
        self.projection: nn.Module | nn.Parameter
        self.declared = {"projection": Matrices((width,) * (self.gates + 1))}
        if not paper:
            self.projection = matrix(config.width, (self.gates + 1) * width)
        elif self.gates:
            self.projection = SeparateProjection(config.width, self.gates, width)
        else:
            self.projection = ValueProjection(config.width, width)
        published = self.gates > 0 and config.gate_form == "signed_root"
        self.norms = GateNorms(self.gates, width, key=paper) if published else None
        self.convolution = (
            ShortConvolution(streams, width, config.kernel, config.max_order) if config.has_convolution else None
        )

    def forward(self, h: Tensor, e: Tensor, dead: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """What is added to the streams: y [B, T, M, D] from streams h of that shape and rows e [B, T, d_mem].

        `dead` bool [B, T]: positions whose gate is 0. `positions` [B, T]: places in their sequences, where a window
        holds several (packed documents); none: a row is one sequence.
        """
        self._check(h, e)
        keys, value = self._project(e)
        u = value.unsqueeze(-2)
        if keys is not None:
            u = self._gate(h, keys).unsqueeze(-1) * u
        if dead is not None:
            u = u.masked_fill(dead[:, :, None, None], 0.0)
        if u.shape[-2] != self.streams:
            u = u.expand(-1, -1, self.streams, -1)
        return u if self.convolution is None else self.convolution(u, positions)

    def gate(self, h: Tensor, e: Tensor, dead: Tensor | None = None) -> Tensor:
        """The gates a [B, T, G], each in 0..1, from streams h [B, T, M, D] and rows e [B, T, d_mem]."""
        self._check(h, e)
        keys, _ = self._project(e)
        if keys is None:
            return h.new_zeros(*h.shape[:2], 0)
        gate = self._gate(h, keys)
        return gate if dead is None else gate.masked_fill(dead[:, :, None], 0.0)

    def _check(self, h: Tensor, e: Tensor) -> None:
        expected = (*h.shape[:2], self.memory_width)
        if h.shape[2:] != (self.streams, self.width) or e.shape != expected:
            raise ValueError(
                f"`h` has the shape {list(h.shape)} and `e` {list(e.shape)}, but must have "
                f"[B, T, {self.streams}, {self.width}] and [B, T, {self.memory_width}]"
            )

    def _project(self, e: Tensor) -> tuple[Tensor | None, Tensor]:
        if isinstance(self.projection, nn.Module):
            keys, value = self.projection(e)
            return keys, value
        both = e @ self.projection
        if not self.gates:
            return None, both
        keys, value = both.split([self.gates * self.width, self.width], dim=-1)
        return keys, value

    def _gate(self, h: Tensor, keys: Tensor) -> Tensor:
        if self.gates != self.streams:
            h = h.mean(-2, keepdim=True)
        h, keys = wide(h), wide(keys.unflatten(-1, (self.gates, self.width)))
        if self.norms is None:
            return ((h * keys).sum(-1) / math.sqrt(self.width)).sigmoid()
        query = normalise(h, self.epsilon) * self.norms.query
        key = normalise(keys, self.epsilon)
        if self.norms.key is not None:
            key = key * self.norms.key
        s = (query * key).sum(-1) / math.sqrt(self.width)
        return (s.sign() * s.abs().clamp_min(1e-6).sqrt()).sigmoid()

    # --- published names ----------------------------------------------------------------------------------------

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights by their published names and layouts ([out, in]); those of the demonstration, or V4.1's `wkv`."""
        return {name: self._published(ours).detach().clone() for name, ours in self._names()}

    def published_gradients(self) -> dict[str, Tensor]:
        """The weights' gradients by their published names and layouts."""
        gradients = {name: p.grad for name, p in self.named_parameters()}
        return {name: self._published(ours, gradients) for name, ours in self._names()}

    def load_published(self, tensors: dict[str, Tensor]) -> None:
        """Takes weights by their published names. Raises `ValueError` for one that is missing, unknown or misshapen."""
        expected = dict(self._names())
        for name in tensors.keys() ^ expected.keys():
            raise ValueError(f"`{name}` is {'missing' if name in expected else 'no weight of this module'}")
        with torch.no_grad():
            for name, ours in expected.items():
                target = self._published(ours)
                if target.shape != tensors[name].shape:
                    needed = list(target.shape)
                    raise ValueError(f"`{name}` has the shape {list(tensors[name].shape)}, but must have {needed}")
                target.copy_(tensors[name])  # a view of our parameter

    def _names(self) -> Iterator[tuple[str, tuple[str, int | None]]]:
        """Published names, each with our parameter and the stream that it is a part of."""
        if not isinstance(self.projection, nn.Module):
            yield "wkv.weight", ("projection", None)
            if self.norms is not None:
                yield "norm.weight", ("norms.query", None)
            return
        yield "value_proj.weight", ("projection.value", None)
        yield "value_proj.bias", ("projection.value_bias", None)
        for m in range(self.gates):
            yield f"key_projs.{m}.weight", ("projection.key", m)
            yield f"key_projs.{m}.bias", ("projection.key_bias", m)
            if self.norms is not None:
                yield f"norm1.{m}.weight", ("norms.key", m)
                yield f"norm2.{m}.weight", ("norms.query", m)
        if self.convolution is not None:
            for m in range(self.streams):
                yield f"short_conv.norms.{m}.weight", ("convolution.norm", m)
            yield "short_conv.conv.weight", ("convolution.weight", None)

    def _published(self, ours: tuple[str, int | None], tensors: dict[str, Tensor | None] | None = None) -> Tensor:
        """A view of our parameter, or of the tensor of its name in `tensors`, in the published layout."""
        name, stream = ours
        tensor = self.get_parameter(name) if tensors is None else tensors[name]
        if tensor is None:
            raise ValueError(f"`{name}` has no gradient: call `backward` first")
        if name == "convolution.weight":
            return tensor.view(-1, 1, tensor.shape[-1])  # [M·D, 1, kernel]
        if name.startswith("projection"):
            part = tensor if stream is None else tensor[..., stream * self.width : (stream + 1) * self.width]
            return part.mT if part.dim() == 2 else part
        return tensor if stream is None else tensor[stream]
