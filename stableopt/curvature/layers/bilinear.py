r"""`first_half`: a parameter's block of the products with per-sample Hessians, from its uses in layers.

One or several layers :math:`z = B_u(w, a)` use a parameter w. With :math:`\Phi_u` the adjoint of
:math:`B_u` in w, the gradient of sample i in w is :math:`\sum_u \Phi_u(a_i, \delta_i)`. With tangents
:math:`\dot a, \dot\delta` along v, the block of :math:`w_i = H_i v` is

.. math:: w_i = \sum_u \Phi_u(\dot a_i, \delta_i) + \Phi_u(a_i, \dot\delta_i),

With P a diagonal preconditioner, a number or a tensor of the parameter's shape, the cotangents are

.. math:: c^\delta = B_u(k_i, a_i), \qquad c^a = \partial_a \langle\delta_i, B_u(k_i, a_i)\rangle,
    \qquad k_i = P w_i - \bar w.

The rank of :math:`w_i` is at most twice the number of positions. Either it is formed, for a few samples
at a time, or its products with heads and slopes are computed without forming it
(:mod:`~stableopt.curvature.layers.rows`). All samples share the mean :math:`\bar w`, so its term is that
of an ordinary layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.layers.kinds import Lookup, Matrix
from stableopt.curvature.layers.rows import Cotangents, Use, along_rows

__all__ = ["Half", "first_half"]

_BLOCK = 2**22
"""Number of entries of the matrices :math:`w_i` formed at once: 16 MiB in single precision."""


class Half(NamedTuple):
    r"""The first half of the computation, which does not need the mean :math:`\bar w`.

    Attributes:
        total: the sum of :math:`w_i` over the samples, in the parameter's shape.
        finish: the second half, ``mean -> cotangents of each use``.
    """

    total: Tensor
    finish: Callable[[Tensor], list[Cotangents]]


def first_half(uses: Sequence[Use], scale: Tensor | float, shape: torch.Size, size: int) -> Half:
    """Return the sum of :math:`w_i`, and the function from the mean to the cotangents.

    Args:
        uses: all uses of the parameter by ``size`` samples.
        scale: P.
        shape: the parameter's shape.
        size: the number of samples.
    """
    if not any(isinstance(use.kind, Matrix | Lookup) for use in uses):
        return _without_maps(uses, scale, shape, size)
    along = along_rows(uses, scale, shape, size)
    if along is not None:
        return Half(_total(uses, shape), partial(_subtract_mean, uses, along))
    return _formed(uses, scale, shape, size)


def _total(uses: Sequence[Use], shape: torch.Size) -> Tensor:
    """Return the sum of :math:`w_i`, by products over all samples at once."""
    parts = [use.kind.grad(use.head, use.slope_tangent, shape) for use in uses]
    for use in uses:
        if use.head_tangent is not None:
            parts.append(use.kind.grad(use.head_tangent, use.slope, shape))
    return _sum(parts)


def _without_maps(uses: Sequence[Use], scale: Tensor | float, shape: torch.Size, size: int) -> Half:
    """Form all :math:`w_i`: without linear maps and lookups they are as small as the slopes."""
    formed = _sum(use.kind.dense(None, use.slope_tangent, shape, size) for use in uses)

    def finish(mean: Tensor) -> list[Cotangents]:
        deviations = formed * scale - mean
        return [Cotangents(None, use.kind.outs(deviations, None, use.slope)) for use in uses]

    return Half(formed.sum(0), finish)


def _formed(uses: Sequence[Use], scale: Tensor | float, shape: torch.Size, size: int) -> Half:
    """Form the :math:`w_i` of a few samples at a time."""
    total = uses[0].slope.new_zeros(shape)
    block_size = max(1, _BLOCK // shape.numel())
    blocks_of_uses: list[list[Cotangents]] = [[] for _ in uses]
    for start in range(0, size, block_size):
        count = min(block_size, size - start)
        parts = [_samples(use, start, count, size) for use in uses]
        kernels = _sum(_dense(part, shape, count) for part in parts)
        total += kernels.sum(0)
        kernels = kernels if isinstance(scale, float) and scale == 1 else kernels * scale
        for blocks, part in zip(blocks_of_uses, parts, strict=True):
            blocks.append(_with_kernels(part, kernels))
    cotangents = [_joined(blocks) for blocks in blocks_of_uses]
    return Half(total, partial(_subtract_mean, uses, cotangents))


def _samples(use: Use, start: int, count: int, size: int) -> Use:
    """Return the use by samples ``start`` to ``start + count`` of ``size``."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        rows = len(tensor) // size
        return tensor[start * rows : (start + count) * rows]

    if count == size:
        return use
    kind, *tensors = use
    return Use(kind, *map(cut, tensors))  # type: ignore[arg-type]


def _dense(use: Use, shape: torch.Size, size: int) -> Tensor:
    """Return the contribution of one use to each :math:`w_i`."""
    kind, head, slope, head_tangent, slope_tangent = use
    contribution = kind.dense(head, slope_tangent, shape, size)
    if head_tangent is not None:
        contribution = contribution + kind.dense(head_tangent, slope, shape, size)
    return contribution


def _with_kernels(use: Use, kernels: Tensor) -> Cotangents:
    """Return the cotangents of a use for :math:`k_i` equal to ``kernels``."""
    along_head = None
    if use.head_tangent is not None:
        assert isinstance(use.kind, Matrix)
        along_head = use.kind.backs(kernels, use.slope, use.head_tangent)
    return Cotangents(along_head, use.kind.outs(kernels, use.head, use.slope))


def _joined(blocks: Sequence[Cotangents]) -> Cotangents:
    if len(blocks) == 1:
        return blocks[0]
    heads = [block.head for block in blocks if block.head is not None]
    slopes = torch.cat([block.slope for block in blocks])
    return Cotangents(torch.cat(heads) if heads else None, slopes)


def _subtract_mean(
    uses: Sequence[Use], cotangents: Sequence[Cotangents], mean: Tensor
) -> list[Cotangents]:
    """Subtract the cotangents of the mean from those of :math:`P w_i`."""
    differences = []
    for use, (along_head, along_slope) in zip(uses, cotangents, strict=True):
        along_slope = along_slope - use.kind.out(mean, use.head, use.slope)
        if along_head is not None:
            assert isinstance(use.kind, Matrix)
            along_head = along_head - use.kind.back(mean, use.slope, along_head)
        differences.append(Cotangents(along_head, along_slope))
    return differences


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total, *others = tensors
    for tensor in others:
        total = total + tensor
    return total
