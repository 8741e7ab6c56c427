"""A use of a parameter that torch functions see nothing of, which no structure covers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HiddenGain"]


class HiddenGain(torch.autograd.Function):
    """``HiddenGain.apply(x, gain)``: the product of ``(n, F)`` and ``(F,)``, which vmap can follow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gain: Tensor) -> Tensor:
        return x * gain

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return slope * gain, (slope * x).sum(0)
