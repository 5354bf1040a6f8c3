"""The weights that a new model begins with: those of the Rust trainer, value for value, for the same seed.

A weight is a function of the seed and its name alone. `engram train` and `python -m engram_lm.train` thus begin at the
same point.
"""

import math
import struct

import torch

from engram_lm._core import initial_values
from engram_lm.config import ModelConfig
from engram_lm.torch.model import LanguageModel


def f32(value: float) -> float:
    """The value rounded to float32."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def initialise(model: LanguageModel, seed: int) -> None:
    """Gives every weight of `model` that is drawn its value; the others are constants already."""
    memory = model.config.memory
    gated = memory is None or memory.form in ("paper", "v41")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = _deviation(name, parameter, model.config)
            if deviation == 0:
                parameter.zero_()
            elif deviation is not None:
                values = torch.empty(parameter.shape)
                initial_values(seed, _drawn_name(name, gated), deviation, values)
                parameter.copy_(values)


def _drawn_name(name: str, gated: bool) -> str:
    """The name under which a weight is drawn: the memory's projections are drawn as the memory's own.

    Forms of memory without gates are drawn under the name that they had first.
    """
    if not gated:
        return name.replace(".memory.", ".ngrams.")
    for part in ("key", "value"):
        name = name.replace(f".memory.projection.{part}", f".memory.{part}")
    return name


def _deviation(name: str, parameter: torch.Tensor, config: ModelConfig) -> float | None:
    """Standard deviation of a weight that is drawn; none for one that is constant."""
    if name in ("embedding", "head"):
        return f32(config.init.embedding if name == "embedding" else config.init.head)
    constant = ("norm", "convolution", "scale", "bias")
    if parameter.dim() < 2 or any(part in name.split(".")[-2] or part in name.split(".")[-1] for part in constant):
        return None
    inputs = parameter.shape[-2]
    if ".memory." in name and config.memory is not None and config.memory.form == "over_encoding":
        inputs = config.memory.row_width
    root = f32(math.sqrt(inputs))
    if ".output" in name:  # writes to the residual: of attention, a feed-forward, the experts
        output = config.init.output
        scale = f32(1 / f32(math.sqrt(2 * config.blocks))) if output is None else f32(output)
    elif ".attention." in name or ".feed_forward." in name:
        scale = f32(config.init.projection)
    else:
        scale = 1.0
    return f32(scale / root)
