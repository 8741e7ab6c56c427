"""`factors`: random factors of the samples' curvature."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors"]


def factors(n: int = 6, outputs: int = 2, d: int = 5, seed: int = 0) -> Tensor:
    """Return factors ``(n, outputs, d)`` of n samples' matrices, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, outputs, d, generator=generator, dtype=torch.float64)
