r"""`hessian_blocks`, `residual_share`: per-sample Hessians along a few directions.

A sample's Hessian is :math:`H_i = J_i^\top L_i J_i + R_i`: the Gauss–Newton matrix, and the residual
part :math:`R_i = \nabla^2\langle q_i, z_i(\theta)\rangle`, the curvature of the outputs weighted by the
fixed gradient of the loss, :math:`q_i = \nabla_z f_i`. :math:`R_i` vanishes if the sample is fitted or
the model is linear. In the mean over samples the :math:`R_i` may cancel without vanishing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import vjp
from stableopt.curvature.per_sample.generic import VMAP_MEMORY, samples_at_once
from stableopt.curvature.problem.over_chunks import gather_over_chunks, over_samples
from stableopt.curvature.problem.problem import Problem, Theta

__all__ = ["hessian_blocks", "residual_share"]

Scalar = Callable[[Theta, Any], Tensor]
"""A differentiable function of the parameters and one sample."""


def hessian_blocks(problem: Problem, basis: Tensor) -> Tensor:
    r"""Return :math:`Q^\top H_i Q` of every sample, ``(n, k, k)``, for ``basis`` Q ``(d, k)``.

    They are in the problem's coordinates, without weight decay, in double precision, for the samples of
    all ranks in order. This takes k products with each :math:`H_i`, in memory independent of n.

    Raises:
        SecondDerivativeError: for a model that cannot be differentiated twice.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # f_i = x_i^2 w^2
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> hessian_blocks(problem, torch.ones(1, 1).double()).flatten()
    tensor([2., 8.], dtype=torch.float64)
    """
    blocks = _map_products(problem, problem.loss, basis, lambda image: basis.T @ image).double()
    return (blocks + blocks.mT) / 2


def residual_share(problem: Problem, vectors: Tensor) -> float:
    r"""Return the share of the residual parts in the samples' Hessians, along ``vectors`` ``(d, k)``.

    It is :math:`(\sum_{i,v}\|R_iv\|^2 / \sum_{i,v}\|H_iv\|^2)^{1/2}`, from single samples, since the
    :math:`R_i` may cancel in the mean. It is 0 if no sample has curvature along the vectors.

    Raises:
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

    def squared_norm(scalar: Scalar) -> float:
        squares = _map_products(
            problem, scalar, vectors, lambda image: image.double().square().sum()
        )
        return float(squares.sum())

    residual, whole = squared_norm(linearised_loss), squared_norm(problem.loss)
    return (residual / whole) ** 0.5 if whole > 0 else 0.0


def _map_products(
    problem: Problem, scalar: Scalar, basis: Tensor, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``function(A_i v)`` for all samples i and columns v, ``(n, k, ...)``.

    A_i is the Hessian of ``scalar``. Samples are vmapped, or looped over if vmap fails.
    """
    problem.check_twice()
    problem = problem.without_weight_decay()
    theta = problem.theta()
    tangents = [tuple(problem.unflatten(vector)) for vector in basis.unbind(1)]

    def products(sample: Any) -> Tensor:
        gradient = torch.func.grad(lambda point: scalar(point, sample))
        pull_back = torch.func.vjp(gradient, theta)[1]
        images = (problem.flatten(pull_back(tangent)[0]) for tangent in tangents)
        return torch.stack([function(image) for image in images])

    def products_without_vmap(sample: Any) -> Tensor:
        slopes = torch.autograd.grad(
            scalar(theta, sample), theta, create_graph=True, allow_unused=True
        )
        images = (problem.flatten(vjp(slopes, theta, list(tangent))) for tangent in tangents)
        return torch.stack([function(image) for image in images])

    def rows(batch: Any, size: int) -> Tensor:
        stacked: Tensor = over_samples(products, products_without_vmap, batch, size)
        return stacked.detach()

    return gather_over_chunks(problem, rows, max(1, samples_at_once(problem, VMAP_MEMORY)))
