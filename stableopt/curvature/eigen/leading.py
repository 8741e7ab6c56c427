"""`leading_eigenpairs`: several of an operator's largest eigenvalues and their vectors, at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.eigen.lanczos import LanczosIteration
from stableopt.curvature.operator import Operator

__all__ = ["LeadingEigenpairs", "leading_eigenpairs"]

_WIDER = 2
"""Lanczos vectors for each eigenvector asked for: the last ones of a basis are far from any."""


@dataclass(frozen=True)
class LeadingEigenpairs:
    """Ritz pairs of a symmetric operator, largest first.

    Attributes:
        values: Ritz values ``(k,)``, in float64 on the CPU.
        vectors: orthonormal Ritz vectors ``(d, k)``.
        absolute_residuals: ``|A v - value v|`` for each, ``(k,)``.
        products: products with the operator.
    """

    values: Tensor
    vectors: Tensor
    absolute_residuals: Tensor
    products: int


def leading_eigenpairs(operator: Operator, count: int, *, seed: int = 0) -> LeadingEigenpairs:
    """Return the algebraically largest eigenvalues and vectors, from one run of Lanczos.

    It takes twice as many products as eigenpairs, without restarts, and holds that many vectors of
    length d. The residuals say how accurate each pair is.

    Raises:
        ValueError: for a count below 1.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.arange(10.0) * vector
    >>> leading_eigenpairs(Diagonal(10, torch.float32, torch.device("cpu")), 5).values.round()
    tensor([9., 8., 7., 6., 5.], dtype=torch.float64)
    """
    count, inner = whole("count", count), InnerProduct.for_operator(operator)
    width = min(_WIDER * count, inner.whole_size(operator.shape[0]))
    with torch.autocast(operator.device.type, enabled=False):
        iteration = LanczosIteration(operator, inner, inner.noise(operator, seed), width, seed)
        iteration.step()
        while iteration.products < width:
            iteration.extend()
            iteration.step()
    best = torch.arange(width - 1, max(width - 1 - count, -1), -1)
    unit, basis = iteration.unit, iteration.basis
    return LeadingEigenpairs(
        iteration.values[best] * unit,
        basis.vectors.T @ iteration.weights[:, best].to(basis.vectors),
        iteration.residuals[best] * unit,
        width,
    )
