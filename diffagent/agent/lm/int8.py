"""Products with weights in 8 bits, on a CPU.

A pass over a few tokens takes as long as its weights take to read, and these are a quarter. torch's
own dynamic quantisation has one range of 7 bits for all inputs of a product, and a language model's
first token is so large that little is left for the others (docs/explanation/decoding.md says what
that is
for SmolLM2). Here each input has its own range and comes in two parts of 7 bits, a coarse one and
what that leaves over, read in one product. What stays is the rounding of the weights.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

# Moved to another package, which wants compilers; torch is pinned to a version with it.
warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)

#: Sums of two products of 8 and 8 bits overflow 16 on AVX2, so an input is -63..63.
_STEPS = 63
_PARTS = 2 * _STEPS  # fine steps in a coarse one: what is left over is at most half of one


class Int8Linear(nn.Module):
    """x W^T + b, every row of W by its largest.

    Args:
        weights: (outputs, inputs) each, taken as if they lay one below the other.
        bias: (all outputs,).
    """

    def __init__(self, *weights: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        weight = torch.cat([weight.detach().float() for weight in weights])
        scales = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = (weight / scales[:, None]).round_().to(torch.int8)
        quantized = torch._make_per_channel_quantized_tensor(rounded, scales, zeros, 0)
        self._packed: Any = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias is None else bias.detach().float()
        # The range of a product is that of all its inputs: with these two, steps of exactly 1.
        self._ends = torch.zeros(1, weight.shape[1])
        self._ends[0, :2] = torch.tensor([_STEPS + 0.5, -_STEPS - 0.5])

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) float32 to (..., outputs)."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        unit = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(_STEPS)
        scaled = rows / unit
        coarse = scaled.round()
        parts = torch.cat([coarse, (scaled - coarse).mul_(_PARTS), self._ends])
        found = torch.ops.quantized.linear_dynamic(parts, self._packed, True)
        whole: Tensor = found[: len(rows)].add(found[len(rows) : -1], alpha=1 / _PARTS).mul_(unit)
        if self._bias is not None:
            whole += self._bias
        return whole.view(*inputs.shape[:-1], -1)


def to_int8(model: nn.Module) -> None:
    """Replace the linear layers of a model on a CPU."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight, bias=child.bias))
