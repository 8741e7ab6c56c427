r"""`Passes`, `Chunk`: a chunk's passes at a point, and the two halves of a product with them.

The halves are the tangents of heads and slopes along v, and the pull back of their cotangents; between
them lies what :mod:`~stableopt.curvature.layers.bilinear` does with each parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import DoubleVjp, vjp
from stableopt.curvature.layers.bilinear import Half, first_half
from stableopt.curvature.layers.recorder import Part, Recorder
from stableopt.curvature.layers.rows import Use
from stableopt.curvature.products.hessian import Hessian

__all__ = ["Chunk", "Passes", "inner_products"]

Tangents = list[Tensor | None]


class Passes:
    """A chunk's passes at theta, ready for the two halves of a product with its Hessians.

    ``heads`` and ``slopes`` are a and delta of every layer.
    """

    def __init__(self, recorder: Recorder, of: Hessian, batch: Any) -> None:
        self.size, self.parts, self.heads = recorder.size, recorder.parts, recorder.heads
        self._theta = of.theta
        with recorder:
            loss = of.problem.loss(of.theta, batch)
        loss = recorder.size * loss
        self.slopes: Sequence[Tensor] = torch.autograd.grad(
            loss, recorder.offsets, create_graph=True, materialize_grads=True
        )
        found = [*self.heads, *self.slopes]
        # Row numbers of a table have no tangent, but keep their place, with a dummy of another dtype.
        dummies = [torch.zeros_like(t, dtype=loss.dtype).requires_grad_() for t in found]
        self._forward = DoubleVjp(found, of.theta, dummies)

    def tangents(self, tangent: Sequence[Tensor]) -> tuple[Tangents, Tangents]:
        """Return the tangents of heads and slopes along v, which make up the :math:`w_i`."""
        found = self._forward.jvp(tangent)
        count = len(self.heads)
        # A head that depends on theta has a cotangent even where its tangent vanishes.
        along_heads = [
            torch.zeros_like(head) if dot is None and head.requires_grad else dot
            for dot, head in zip(found[:count], self.heads, strict=True)
        ]
        return along_heads, list(found[count:])

    def pulled(self, along_heads: Tangents, along_slopes: Tangents) -> tuple[Tensor | None, ...]:
        """Return the second half of the product, from the cotangents of heads and slopes."""
        return vjp([*self.heads, *self.slopes], self._theta, [*along_heads, *along_slopes])


def _uses(passes: Passes, tangent: Sequence[Tensor]) -> Iterator[tuple[int, list[Part], list[Use]]]:
    """Yield each parameter with its parts and its uses, with tangents along one vector."""
    along_heads, along_slopes = passes.tangents(tangent)
    dtype = tangent[0].dtype
    by_parameter: dict[int, list[Part]] = defaultdict(list)
    for part in passes.parts:
        by_parameter[part.parameter].append(part)

    def use(part: Part) -> Use:
        # An autocast leaves heads and slopes in half precision.
        slope, dot = passes.slopes[part.slope].detach().to(dtype), along_slopes[part.slope]
        dot = torch.zeros_like(slope) if dot is None else dot.to(dtype)
        if part.head is None:
            return Use(part.kind, None, slope, None, dot)
        head, along = passes.heads[part.head].detach(), along_heads[part.head]
        if not head.is_floating_point():
            return Use(part.kind, head, slope, None, dot)
        return Use(
            part.kind, head.to(dtype), slope, None if along is None else along.to(dtype), dot
        )

    for index, parts in sorted(by_parameter.items()):
        yield index, parts, [use(part) for part in parts]


def inner_products(passes: Passes, tangent: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\langle w_i, u\rangle` of each sample in each parameter, ``(n, parameters)``."""
    found = tangent[0].new_zeros(passes.size, len(tangent))
    for index, _, uses in _uses(passes, tangent):
        for kind, head, slope, head_tangent, slope_tangent in uses:
            terms = kind.out(others[index], head, slope) * slope_tangent
            if head_tangent is not None:
                terms = terms + kind.out(others[index], head_tangent, slope) * slope
            found[:, index] += terms.reshape(passes.size, -1).sum(1)
    return found


class Chunk:
    """A chunk's passes and the first half of its product with one vector.

    Attributes:
        totals: the sum of :math:`w_i` over the chunk, for each parameter.
    """

    def __init__(
        self, passes: Passes, tangent: Sequence[Tensor], scale: Sequence[Tensor | float]
    ) -> None:
        self._passes = passes
        self._parts: dict[int, list[Part]] = {}
        self._halves: dict[int, Half] = {}
        self.totals: list[Tensor | None] = [None] * len(tangent)
        for index, parts, uses in _uses(passes, tangent):
            half = first_half(uses, scale[index], tangent[index].shape, passes.size)
            self._halves[index], self.totals[index] = half, half.total
            self._parts[index] = parts

    def pulled(self, mean: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the sum of :math:`H_i (D^2 w_i - m)` over the chunk, for each parameter."""
        passes = self._passes
        along_heads: Tangents = [None] * len(passes.heads)
        along_slopes: Tangents = [None] * len(passes.slopes)
        for index, parts in self._parts.items():
            found = self._halves[index].finish(mean[index])
            for part, (along_head, along_slope) in zip(parts, found, strict=True):
                _add(along_slopes, part.slope, along_slope, passes.slopes)
                if part.head is not None and along_head is not None:
                    _add(along_heads, part.head, along_head, passes.heads)
        return passes.pulled(along_heads, along_slopes)


def _add(to: Tangents, where: int, term: Tensor, like: Sequence[Tensor]) -> None:
    before = to[where]
    term = term.to(like[where].dtype)
    to[where] = term if before is None else before + term
