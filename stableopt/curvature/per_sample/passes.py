r"""`Passes`, `Chunk`: a chunk's passes at a point, and the two halves of a structured product.

The first half is the tangents of heads and slopes along v. Then
:mod:`~stableopt.curvature.layers.bilinear` turns them into cotangents, parameter by parameter. The
second half pulls these back to the parameters.
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
    r"""A chunk's passes at theta, for the two halves of a product with its Hessians.

    ``heads`` and ``slopes`` are :math:`a` and :math:`\delta` of every layer.
    """

    def __init__(self, recorder: Recorder, mean: Hessian, batch: Any) -> None:
        self.size, self.parts, self.heads = recorder.size, recorder.parts, recorder.heads
        self._theta = mean.theta
        with recorder:
            loss = mean.problem.loss(mean.theta, batch)
        loss = recorder.size * loss
        self.slopes: Sequence[Tensor] = torch.autograd.grad(
            loss, recorder.offsets, create_graph=True, materialize_grads=True
        )
        outputs = [*self.heads, *self.slopes]
        # Indices into an embedding have no tangent; a floating-point dummy keeps their place.
        dummies = [torch.zeros_like(t, dtype=loss.dtype).requires_grad_() for t in outputs]
        self._jacobian = DoubleVjp(outputs, mean.theta, dummies)

    def tangents(self, tangent: Sequence[Tensor]) -> tuple[Tangents, Tangents]:
        """Return the tangents of heads and slopes along v, which determine all :math:`w_i`."""
        tangents = list(self._jacobian.jvp(tangent))
        count = len(self.heads)
        head_tangents, slope_tangents = tangents[:count], tangents[count:]
        for index, head in enumerate(self.heads):
            # A head that depends on theta has a cotangent even if its tangent vanishes.
            if head_tangents[index] is None and head.requires_grad:
                head_tangents[index] = torch.zeros_like(head)
        return head_tangents, slope_tangents

    def pull_back(
        self, head_cotangents: Tangents, slope_cotangents: Tangents
    ) -> tuple[Tensor | None, ...]:
        """Return the second half of the product, from the cotangents of heads and slopes."""
        outputs, cotangents = [*self.heads, *self.slopes], [*head_cotangents, *slope_cotangents]
        return vjp(outputs, self._theta, cotangents)


def _uses(passes: Passes, tangent: Sequence[Tensor]) -> Iterator[tuple[int, list[Part], list[Use]]]:
    """Yield the index of each parameter, its parts and their uses, with tangents along one vector."""
    head_tangents, slope_tangents = passes.tangents(tangent)
    dtype = tangent[0].dtype
    by_parameter: dict[int, list[Part]] = defaultdict(list)
    for part in passes.parts:
        by_parameter[part.parameter].append(part)

    def use(part: Part) -> Use:
        # Under autocast, heads and slopes are in half precision.
        slope = passes.slopes[part.slope].detach().to(dtype)
        slope_tangent = slope_tangents[part.slope]
        if slope_tangent is None:
            slope_tangent = torch.zeros_like(slope)
        slope_tangent = slope_tangent.to(dtype)
        if part.head is None:
            return Use(part.kind, None, slope, None, slope_tangent)
        head, head_tangent = passes.heads[part.head].detach(), head_tangents[part.head]
        if not head.is_floating_point():
            return Use(part.kind, head, slope, None, slope_tangent)
        if head_tangent is not None:
            head_tangent = head_tangent.to(dtype)
        return Use(part.kind, head.to(dtype), slope, head_tangent, slope_tangent)

    for index, parts in sorted(by_parameter.items()):
        yield index, parts, [use(part) for part in parts]


def inner_products(passes: Passes, tangent: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`\langle w_i, u\rangle` for each sample and parameter, ``(n, parameters)``.

    ``others`` is u, one tensor per parameter.
    """
    products = tangent[0].new_zeros(passes.size, len(tangent))
    for index, _, uses in _uses(passes, tangent):
        for kind, head, slope, head_tangent, slope_tangent in uses:
            terms = kind.out(others[index], head, slope) * slope_tangent
            if head_tangent is not None:
                terms = terms + kind.out(others[index], head_tangent, slope) * slope
            products[:, index] += terms.reshape(passes.size, -1).sum(1)
    return products


class Chunk:
    """A chunk's passes, and the first half of its product with one vector.

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

    def pull_back(self, mean: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the sum of :math:`H_i (D^2 w_i - m)` over the chunk, for each parameter."""
        passes = self._passes
        head_cotangents: Tangents = [None] * len(passes.heads)
        slope_cotangents: Tangents = [None] * len(passes.slopes)
        for index, parts in self._parts.items():
            cotangents = self._halves[index].finish(mean[index])
            for part, (of_head, of_slope) in zip(parts, cotangents, strict=True):
                _add(slope_cotangents, part.slope, of_slope, passes.slopes)
                if part.head is not None and of_head is not None:
                    _add(head_cotangents, part.head, of_head, passes.heads)
        return passes.pull_back(head_cotangents, slope_cotangents)


def _add(totals: Tangents, index: int, term: Tensor, like: Sequence[Tensor]) -> None:
    """Add a term to one of the totals, in the dtype of the corresponding tensor of ``like``."""
    total = totals[index]
    term = term.to(like[index].dtype)
    totals[index] = term if total is None else total + term
