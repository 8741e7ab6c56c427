r"""`hessian_blocks`, `residual_share`: per-sample Hessians along a few directions.

A sample's Hessian is :math:`H_i = J_i^\top L_i J_i + R_i`: the Gauss–Newton matrix, and the residual
part :math:`R_i = \nabla^2\langle q_i, z_i(\theta)\rangle`, the curvature of the outputs weighted by the
fixed gradient of the loss, :math:`q_i = \nabla_z f_i`. :math:`R_i` vanishes if the sample is fitted or
the model is linear. In the mean over samples the :math:`R_i` may cancel without vanishing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import vjp
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.per_sample.generic import VMAP_MEMORY, samples_at_once
from stableopt.curvature.problem.over_chunks import (
    gather_over_chunks,
    mean_over_chunks,
    over_samples,
)
from stableopt.curvature.problem.problem import Problem, Theta

__all__ = ["hessian_blocks", "residual_share"]

Scalar = Callable[[Theta, Any], Tensor]
"""A differentiable function of the parameters and one sample."""

OfSample = Callable[[Callable[[Tensor], Tensor]], Tensor]
"""A function of a product with one sample's matrix, ``(d,) -> (d,)``."""

_ROUNDS = 3
"""Rounds of the power method. From the top eigenvector, at twelve networks of 5,000 to 900,000
parameters, the residual part after three was at least 91 % of that after six."""


def hessian_blocks(problem: Problem, basis: Tensor) -> Tensor:
    r"""Return :math:`Q^\top H_i Q` of every sample, ``(n, k, k)``, for ``basis`` Q ``(d, k)``.

    They are in the problem's coordinates, without weight decay, in double precision, for the samples of
    all ranks in order. This takes k products with each :math:`H_i`, in memory independent of n.

    Raises:
        NonFiniteError: if the Hessian of a sample is not finite.
        SecondDerivativeError: for a model that cannot be differentiated twice.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # f_i = x_i^2 w^2
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> hessian_blocks(problem, torch.ones(1, 1).double()).flatten()
    tensor([2., 8.], dtype=torch.float64)
    """
    rows = _rows_of(
        problem,
        problem.loss,
        lambda multiply: torch.stack([basis.T @ multiply(vector) for vector in basis.unbind(1)]),
    )
    at_once = max(1, samples_at_once(problem, VMAP_MEMORY))
    blocks = gather_over_chunks(problem, rows, at_once).double()
    bad = (~blocks.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise NonFiniteError(f"the Hessian of sample {int(bad[0])} is not finite")
    return (blocks + blocks.mT) / 2


def residual_share(problem: Problem, vectors: Tensor, *, start: Tensor | None = None) -> float:
    r"""Return the share of the residual parts in the samples' Hessians, along ``vectors`` ``(d, k)``.

    It is a ratio of root mean squares over the samples, that of :math:`\|R_iv\|` over that of
    :math:`\|H_iv\|`, each for the v of length 1 in the span at which it is largest. Along all directions
    it is :math:`(\lambda_{\max}(\sum_i R_i^2)/\lambda_{\max}(\sum_i H_i^2))^{1/2}`. It takes single
    samples, since the :math:`R_i` may cancel in the mean. It is 0 if no sample has curvature.

    Args:
        problem: the problem.
        vectors: orthonormal directions.
        start: a direction ``(d,)`` from which the power method with :math:`\sum_i R_i^2` looks for the
            largest residual parts, instead of along ``vectors``. Among many parameters, fixed vectors
            hold almost nothing of residual parts along a few.

    Raises:
        NonFiniteError: if the Hessian of a sample is not finite.
        ValueError: for a problem from a batch loss, which does not separate outputs and loss.
        SecondDerivativeError: for a model that cannot be differentiated twice.

    >>> class Square(torch.nn.Module):                       # f_i = (w^2 / 2 - y_i)^2
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(1).double())
    ...     def forward(self, x):
    ...         return x * self.weight**2 / 2
    >>> x, y = torch.ones(2, 1).double(), torch.tensor([[0.5], [1.5]]).double()
    >>> problem = Problem(Square(), torch.nn.MSELoss(), (x, y))    # H_i = 2 and 2 - 2, R_i = 0 and -2
    >>> residual_share(problem, torch.ones(1, 1).double())
    1.0
    """
    if problem.loss_fn is None:
        raise ValueError(
            "problem: the residual part of its Hessians needs the model's outputs apart from the loss;"
            " build the problem as Problem(model, loss_fn, data)"
        )

    def linearised_loss(theta: Theta, sample: Any) -> Tensor:
        outputs = problem.outputs(theta, sample)
        slope = torch.func.grad(lambda z: problem.loss_of_outputs(z, sample))(outputs.detach())
        product: Tensor = (slope.detach() * outputs).sum()
        return product

    def largest(scalar: Scalar) -> float:
        square = vectors.double().T @ _mean_square(problem, scalar, vectors)
        if not bool(square.isfinite().all()):
            raise NonFiniteError("the Hessian of a sample is not finite")
        return max(0.0, float(torch.linalg.eigvalsh((square + square.T) / 2)[-1]))

    whole = largest(problem.loss)
    if whole == 0:
        return 0.0
    if start is None:
        return math.sqrt(largest(linearised_loss) / whole)
    residual, vector = 0.0, start / start.norm()
    for _ in range(_ROUNDS):
        image = _mean_square(problem, linearised_loss, vector.unsqueeze(1)).squeeze(1)
        residual = float(image.norm())  # at most the largest eigenvalue
        if residual == 0:
            return 0.0
        if not math.isfinite(residual):
            raise NonFiniteError("the residual part of a sample's Hessian is not finite")
        vector = (image / residual).to(start)
    return math.sqrt(residual / whole)


def _rows_of(problem: Problem, scalar: Scalar, of_sample: OfSample) -> Callable[[Any, int], Tensor]:
    """Return ``rows(batch, size)``: ``of_sample`` of each sample's products.

    The products are with the sample's Hessian of ``scalar``. Samples are vmapped, or looped over if
    vmap fails.
    """
    problem.check_twice()
    problem = problem.without_weight_decay()
    theta = problem.theta()

    def row(sample: Any) -> Tensor:
        gradient = torch.func.grad(lambda point: scalar(point, sample))
        pull_back = torch.func.vjp(gradient, theta)[1]
        return of_sample(
            lambda vector: problem.flatten(pull_back(tuple(problem.unflatten(vector)))[0])
        )

    def row_without_vmap(sample: Any) -> Tensor:
        slopes = torch.autograd.grad(
            scalar(theta, sample), theta, create_graph=True, allow_unused=True
        )
        return of_sample(
            lambda vector: problem.flatten(vjp(slopes, theta, list(problem.unflatten(vector))))
        )

    def rows(batch: Any, size: int) -> Tensor:
        stacked: Tensor = over_samples(row, row_without_vmap, batch, size)
        return stacked.detach()

    return rows


def _twice(multiply: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """Return the square of a matrix times ``vector``, which single precision may not hold."""
    image = multiply(vector)
    size = image.abs().amax()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return multiply(image / size).double() * size.double()


def _mean_square(problem: Problem, scalar: Scalar, basis: Tensor) -> Tensor:
    r"""Return :math:`\frac1n\sum_i A_i^2Q` ``(d, k)`` for the samples' Hessians A of ``scalar``."""
    total = torch.zeros_like(basis.T, dtype=torch.float64)
    rows = _rows_of(
        problem,
        scalar,
        lambda multiply: torch.stack([_twice(multiply, v) for v in basis.unbind(1)]),
    )

    def add(batch: Any, size: int) -> None:
        total.add_(rows(batch, size).sum(0, dtype=torch.float64))

    at_once = max(1, samples_at_once(problem, VMAP_MEMORY))
    return mean_over_chunks(problem, [total], add, problem.chunks(at_once))[0].T
