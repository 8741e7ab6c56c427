r"""`ShardedHessian`: products with the Hessian of a model under ``fully_shard``.

.. math:: Hv \approx \frac{\nabla f(\theta + hv) - \nabla f(\theta - hv)}{2h}

FSDP computes the gradients. The vector v, like all vectors of a search, is sharded as the parameters
are: an inner product is local, then summed over the ranks
(:class:`~stableopt.curvature.eigen.inner_product.InnerProduct`).

The step balances rounding, about :math:`\epsilon|\nabla f|/h`, against truncation, of order
:math:`h^2`: :math:`h = \epsilon^{1/3}|\theta|/(16|v|)`, and shorter where a second step, of half the
length, shows that this was too long.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from stableopt.curvature.autodiff import central_difference
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.operator import Operator
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.problem.mean_loss import MeanLoss, Memo
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.problem.sharded import STEP, ShardedProblem, cube_root
from stableopt.curvature.products.hessian import Hessian

__all__ = ["ShardedHessian", "hessian_of"]

_FINE, _HALVINGS = 1e-3, 5

_UNSURE = 0.05
"""Relative difference of a product between two steps that is worth a warning: smooth networks stay
below 1e-3, those with kinks, whose Hessian a difference blurs, do not."""

_STEP: Memo[float] = Memo()
"""The step found for a problem, relative to the norm of all parameters."""


class ShardedHessian(Operator):
    r"""The Hessian of a :class:`ShardedProblem`, by central differences of gradients.

    ``operator @ v`` takes and returns this rank's part of a vector, on every rank. In the coordinates
    of :meth:`Problem.transformed` the matrix is :math:`D(\pm H + \Lambda)D`.

    Args:
        problem: the mean loss.

    A product takes two gradients. The first takes two more, for a second step; if they differ by more
    than 1e-3, shorter steps follow as long as the difference falls. If the best ones still differ by
    more than 5 %, a ``RuntimeWarning`` says so.
    """

    def __init__(self, problem: ShardedProblem) -> None:
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem, self.theta = problem, problem.theta()
        self.inner_product = InnerProduct(ranks=problem.ranks, sharded_size=problem.total_params)
        self._size = problem.norm(torch.cat([t.reshape(-1) for t in self.theta])) or 1.0
        self._tried = False

    def product(self, vector: Tensor) -> Tensor:
        """Return this rank's part of the product with the vector that all ranks' parts make up."""
        problem = self.problem
        tangent = problem.unflatten(vector)
        length = problem.norm(torch.cat([part.reshape(-1) for part in tangent]))
        if length == 0:
            return torch.zeros_like(vector)
        if not self._tried:
            self._tried = True
            self._choose_step(tangent, length)
        image = self._difference(tangent, self._step / length)
        problem.coordinates.add_decay(image, tangent)
        return image

    def block_product(
        self, places: Sequence[int], coordinates: Coordinates, vector: Tensor
    ) -> Tensor:
        """Return the product with the principal block of the parameters at ``places``.

        It is part of a whole product. Arguments are those of :meth:`Hessian.block_product`.
        """
        tangent = coordinates.unflatten(vector)
        everywhere = [torch.zeros_like(t) for t in self.theta]
        for place, part in zip(places, tangent, strict=True):
            everywhere[place] = part
        image = self._plain.product(torch.cat([t.reshape(-1) for t in everywhere]))
        parts = torch.split(image, [t.numel() for t in self.theta])
        own = coordinates.flatten(
            [parts[p].view(t.shape) for p, t in zip(places, tangent, strict=True)]
        )
        coordinates.add_decay(own, tangent)
        return own

    @cached_property
    def _plain(self) -> ShardedHessian:
        """The Hessian in the parameters' own coordinates, at the same point."""
        other = copy.copy(self)
        other.problem = self.problem.transformed(sign=self.problem.sign)
        return other

    @property
    def _factor(self) -> float:
        return _STEP.on(self.problem).get("step", STEP)

    @property
    def _step(self) -> float:
        """How far to go, in parameters."""
        return self._factor * cube_root(self.dtype) * self._size

    def _difference(self, tangent: list[Tensor], h: float) -> Tensor:
        return central_difference(lambda step: self.problem.at(self.theta, tangent, step)[1], h)

    def _choose_step(self, tangent: list[Tensor], length: float) -> None:
        """Halve the step until two of them agree, or come no closer."""
        problem, factor, h = self.problem, self._factor, self._step / length
        image, shorter = self._difference(tangent, h), self._difference(tangent, h / 2)
        difference = problem.norm(image - shorter) / (problem.norm(shorter) or 1.0)
        for _ in range(_HALVINGS):
            if not difference > _FINE:
                break
            h, image = h / 2, shorter
            shorter = self._difference(tangent, h / 2)
            closer = problem.norm(image - shorter) / (problem.norm(shorter) or 1.0)
            if not closer < difference / 2:
                break
            difference, factor = closer, factor / 2
        _STEP.on(problem)["step"] = factor
        if difference > _UNSURE and problem.ranks.rank == 0:
            warnings.warn(
                f"the Hessian by differences of FSDP's gradients changes by {difference:.0%} between"
                " two steps: activations with kinks, or parameters of low precision. The sharpness is"
                " that uncertain, beyond its residual",
                RuntimeWarning,
                stacklevel=2,
            )

    def loss(self) -> float:
        """Return the problem's mean loss at the point."""
        return self.problem.value(self.theta)


def hessian_of(
    problem: MeanLoss, *, gradient: bool = False, lasting: bool = True
) -> Hessian | ShardedHessian:
    """Return the Hessian of a problem, sharded if the problem is; options are those of a Hessian."""
    if isinstance(problem, ShardedProblem):
        return ShardedHessian(problem)
    assert isinstance(problem, Problem)
    return Hessian(problem, gradient=gradient, lasting=lasting)
