r"""`DenseRows`: the covariance of the per-sample Gauss–Newton matrices from all of their rows.

With :math:`\hat J` the rows of all samples (:mod:`~stableopt.curvature.gram.jacobian`), K their Gram
matrix and :math:`K_d` its block diagonal,

.. math:: \Sigma v = \tfrac1n \hat J^\top (K_d - K/n)\, \hat J v,

two products with :math:`\hat J` and a small one. For few rows this is faster than passes through the
network, which are mostly overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.gram.gram import count_outputs
from stableopt.curvature.gram.jacobian import sample_rows
from stableopt.curvature.problem.over_chunks import gather_over_chunks
from stableopt.curvature.products.gauss_newton import GaussNewton

__all__ = ["DenseRows"]

_NUMBERS = 2**19
"""Numbers in all rows up to which a dozen products pay for computing them. A product is faster up to
about 2**22, but the rows then take as long as a hundred products."""

_ROWS = 2048
"""Rows up to which their Gram matrix is cheap."""


class DenseRows:
    """Products with the covariance of the samples' matrices, whose mean is ``of``.

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

        def rows_of(batch: Any, size: int) -> Tensor:
            return torch.cat(sample_rows(problem, of.theta, batch, size), dim=2)

        rows = gather_over_chunks(problem, rows_of)
        n, outputs, size = rows.shape
        self._rows = rows.reshape(n * outputs, size)
        gram = self._rows @ self._rows.T
        self._middle = -gram / n
        blocks = self._middle.view(n, outputs, n, outputs)
        blocks.diagonal(dim1=0, dim2=2).add_((rows @ rows.mT).movedim(0, -1))
        self._middle /= n

    @staticmethod
    def faster(of: GaussNewton) -> bool:
        """Whether the rows are few enough to be faster than passes through the network."""
        problem = of.problem
        rows = problem.num_samples * count_outputs(problem)
        return problem.equal_weights and rows <= _ROWS and rows * problem.num_params <= _NUMBERS

    def __call__(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product with each vector ``(d,)``."""
        block = torch.stack(list(vectors), dim=1)
        return list((self._rows.T @ (self._middle @ (self._rows @ block))).unbind(1))
