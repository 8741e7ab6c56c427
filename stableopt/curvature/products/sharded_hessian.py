r"""`ShardedHessian`: products with the Hessian of a model under ``fully_shard``.

.. math:: Hv \approx \frac{\nabla f(\theta + hv) - \nabla f(\theta - hv)}{2h}

FSDP computes the gradients. All vectors are sharded like the parameters: an inner product is computed
locally, then summed over the ranks (:class:`~stableopt.curvature.eigen.inner_product.InnerProduct`).

The step balances rounding, about :math:`\epsilon|\nabla f|/h`, against truncation, of order
:math:`h^2`: :math:`h = \epsilon^{1/3}|\theta|/(16|v|)`. It is halved while the difference over half the
step disagrees.
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
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.problem.sharded import STEP, ShardedProblem, cube_root
from stableopt.curvature.products.hessian import Hessian

__all__ = ["ShardedHessian", "hessian_of"]

_FINE, _HALVINGS = 1e-3, 5
"""Relative difference up to which products over two steps agree, and the most halvings of the step."""

_UNSURE = 0.05
"""Relative difference of products over two steps that is worth a warning. Smooth networks stay below
1e-3; networks with kinks do not."""

_STEP: Memo[float] = Memo()
"""The step found for a problem, relative to the norm of all parameters."""


class ShardedHessian(Operator):
    r"""The Hessian of a :class:`ShardedProblem`, by central differences of gradients.

    ``operator @ v`` takes and returns this rank's shard of a vector, on every rank. In the coordinates
    of :meth:`Problem.transformed` the matrix is :math:`D(\pm H + \Lambda)D`.

    A product takes two gradients. The first product takes two more, for a second step. If the two steps
    differ by more than 1e-3, shorter steps follow as long as the difference falls. If the best two still
    differ by more than 5 %, a ``RuntimeWarning`` says so.

    Args:
        problem: the mean loss.
    """

    def __init__(self, problem: ShardedProblem) -> None:
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem, self.theta = problem, problem.theta()
        self.inner_product = InnerProduct(ranks=problem.ranks, sharded_size=problem.total_params)
        self._theta_norm = problem.norm(torch.cat([t.reshape(-1) for t in self.theta])) or 1.0
        self._step_is_chosen = False

    def product(self, vector: Tensor) -> Tensor:
        """Return this rank's shard of the product; ``vector`` is this rank's shard."""
        problem = self.problem
        tangent = problem.unflatten(vector)
        norm = problem.norm(torch.cat([part.reshape(-1) for part in tangent]))
        if norm == 0:
            return torch.zeros_like(vector)
        if not self._step_is_chosen:
            self._step_is_chosen = True
            self._choose_step(tangent, norm)
        image = self._difference(tangent, self._step / norm)
        problem.coordinates.add_decay(image, tangent)
        return image

    def block_product(
        self, places: Sequence[int], coordinates: Coordinates, vector: Tensor
    ) -> Tensor:
        """Return the product with the principal block of the parameters at ``places``.

        It is cut from a whole product. Arguments are those of :meth:`Hessian.block_product`.
        """
        tangent = coordinates.unflatten(vector)
        padded = [torch.zeros_like(t) for t in self.theta]
        for place, part in zip(places, tangent, strict=True):
            padded[place] = part
        image = self._untransformed.product(torch.cat([t.reshape(-1) for t in padded]))
        parts = torch.split(image, [t.numel() for t in self.theta])
        block = coordinates.flatten(
            [parts[p].view(t.shape) for p, t in zip(places, tangent, strict=True)]
        )
        coordinates.add_decay(block, tangent)
        return block

    @cached_property
    def _untransformed(self) -> ShardedHessian:
        """The Hessian in untransformed coordinates, at the same point."""
        other = copy.copy(self)
        other.problem = self.problem.untransformed()
        return other

    @property
    def _factor(self) -> float:
        return _STEP.of(self.problem).get("step", STEP)

    @property
    def _step(self) -> float:
        """The norm of the displacement of the parameters."""
        return self._factor * cube_root(self.dtype) * self._theta_norm

    def _difference(self, tangent: list[Tensor], h: float) -> Tensor:
        return central_difference(lambda step: self.problem.at(self.theta, tangent, step)[1], h)

    def _choose_step(self, tangent: list[Tensor], norm: float) -> None:
        """Halve the step until two steps agree, or halving no longer helps."""
        problem, factor, h = self.problem, self._factor, self._step / norm
        image, half_step_image = self._difference(tangent, h), self._difference(tangent, h / 2)
        disagreement = self._relative_difference(image, half_step_image)
        for _ in range(_HALVINGS):
            if not disagreement > _FINE:
                break
            h, image = h / 2, half_step_image
            half_step_image = self._difference(tangent, h / 2)
            next_disagreement = self._relative_difference(image, half_step_image)
            if not next_disagreement < disagreement / 2:
                break
            disagreement, factor = next_disagreement, factor / 2
        _STEP.of(problem)["step"] = factor
        if disagreement > _UNSURE and problem.ranks.rank == 0:
            warnings.warn(
                f"the Hessian by differences of FSDP's gradients changes by {disagreement:.0%} between"
                " two steps: activations with kinks, or parameters of low precision. The sharpness is"
                " that uncertain, in addition to its residual",
                RuntimeWarning,
                stacklevel=2,
            )

    def _relative_difference(self, image: Tensor, reference: Tensor) -> float:
        norm = self.problem.norm
        return norm(image - reference) / (norm(reference) or 1.0)

    def loss(self) -> float:
        """Return the problem's mean loss at theta."""
        return self.problem.value(self.theta)


def hessian_of(
    problem: MeanLoss, *, gradient: bool = False, lasting: bool = True
) -> Hessian | ShardedHessian:
    """Return the Hessian of a problem, sharded if the problem is; options are those of `Hessian`."""
    if isinstance(problem, ShardedProblem):
        return ShardedHessian(problem)
    assert isinstance(problem, Problem)
    return Hessian(problem, gradient=gradient, lasting=lasting)
