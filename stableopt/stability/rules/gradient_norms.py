"""`norms_of_gradients`: the norm of each parameter's gradient, on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local

__all__ = ["norms_of_gradients", "widest"]


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return double precision if a tensor has it, else single precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def norms_of_gradients(params: Sequence[Tensor]) -> Tensor:
    """Return the norm of each parameter's gradient, 0 for a parameter without one.

    The norms are in single precision, or in double precision if a gradient is.
    """
    norms = [torch.zeros((), device=p.device) if p.grad is None else _norm(p.grad) for p in params]
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        dtype = widest(norms)
        norms = [norm.to(norms[0].device, dtype) for norm in norms]
    return torch.stack(norms)


def _norm(gradient: Tensor) -> Tensor:
    values = local(gradient.detach())
    values = real_view(values.coalesce().values() if values.is_sparse else values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype)
    return norm
