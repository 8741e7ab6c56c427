r"""The covariance of the per-sample Gauss–Newton matrices from all rows, where they are few.

With :math:`\hat J` the rows of all samples (:mod:`~stableopt.curvature.gram.jacobian`), K their Gram matrix
and :math:`K_d` its block diagonal,

.. math:: \Sigma v = \tfrac1n \hat J^\top (K_d - K/n)\, \hat J v,

two products with :math:`\hat J` and a small one, where passes through a network are all overhead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature.gram.gram import count_outputs
from stableopt.curvature.gram.jacobian import sample_rows
from stableopt.curvature.products.gauss_newton import GaussNewton

__all__ = ["DenseRows"]

_NUMBERS = 2**19
"""Numbers in all rows up to which making them is paid for by a dozen products. Beyond, a product would
still be quicker up to some 2**22, but making the rows takes as long as a hundred of them."""

_ROWS = 2048
"""Rows up to which their Gram matrix is small."""


class DenseRows:
    """Products with the covariance, by the rows at the point of ``of``.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()   # f_i = x_i^2 w^2, G_i = 2 x_i^2
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> from stableopt.curvature import Problem
    >>> of = GaussNewton(Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double())))
    >>> [image] = DenseRows(of)([torch.ones(1).double()])
    >>> image.round()
    tensor([9.], dtype=torch.float64)
    """

    def __init__(self, of: GaussNewton) -> None:
        problem = of.problem

        def own() -> Tensor:
            with problem.evaluation():
                parts = [
                    torch.cat(sample_rows(problem, of.theta, batch, size), dim=2)
                    for batch, size in problem.chunks()
                ]
            return torch.cat(parts)

        rows = problem.ranks.all_gather(problem.ranks.raise_together(own))
        n, outputs, size = rows.shape
        self._rows = rows.reshape(n * outputs, size)
        gram = self._rows @ self._rows.T
        self._middle = -gram / n
        blocks = self._middle.view(n, outputs, n, outputs)
        blocks.diagonal(dim1=0, dim2=2).add_((rows @ rows.mT).movedim(0, -1))
        self._middle /= n

    @staticmethod
    def quicker(of: GaussNewton) -> bool:
        """Whether the rows are few enough."""
        problem = of.problem
        rows = problem.num_samples * count_outputs(problem)
        return problem.equal_weights and rows <= _ROWS and rows * problem.num_params <= _NUMBERS

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``, all of them in one."""
        block = torch.stack(list(vectors), dim=1)
        return list((self._rows.T @ (self._middle @ (self._rows @ block))).unbind(1))
