"""The leading eigenvectors of an operator, several at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt._arguments import whole
from stableopt.curvature.eigen.inner_product import on_host
from stableopt.curvature.eigen.top_eigenpair import NonFiniteError
from stableopt.curvature.operator import Operator

__all__ = ["LeadingEigenpairs", "leading_eigenpairs"]

_WIDER = 2
"""Lanczos vectors for each eigenvector asked for: the last ones of a basis are not yet any."""


@dataclass(frozen=True)
class LeadingEigenpairs:
    """Ritz pairs of a symmetric operator, largest first.

    Attributes:
        values: Ritz values ``(k,)``, in double precision on the CPU.
        vectors: orthonormal Ritz vectors ``(d, k)``.
        absolute_residuals: ``|A v - value v|`` for each, ``(k,)``.
        products: products with the operator.
    """

    values: Tensor
    vectors: Tensor
    absolute_residuals: Tensor
    products: int


def leading_eigenpairs(operator: Operator, count: int, *, seed: int = 0) -> LeadingEigenpairs:
    """Return the algebraically largest eigenvalues and vectors, by one run of Lanczos.

    Of twice as many products as eigenpairs, without restarts: what it is accurate to, the residuals
    say. It holds that many vectors of length d.

    Raises:
        ValueError: for a count below 1.
        NonFiniteError: if a product holds an infinity or a NaN.

    >>> class Diagonal(Operator):
    ...     def product(self, vector):
    ...         return torch.arange(10.0) * vector
    >>> leading_eigenpairs(Diagonal(10, torch.float32, torch.device("cpu")), 5).values.round()
    tensor([9., 8., 7., 6., 5.], dtype=torch.float64)
    """
    count, size = whole("count", count), operator.shape[0]
    width = min(_WIDER * count, size)
    generator = torch.Generator(device=operator.device).manual_seed(seed)
    eps = torch.finfo(operator.dtype).eps

    def fresh() -> Tensor:
        return torch.randn(size, generator=generator, dtype=operator.dtype, device=operator.device)

    basis = torch.zeros(width, size, dtype=operator.dtype, device=operator.device)
    projected = torch.zeros(width, width, dtype=torch.float64)
    following, beta, scale = fresh(), 0.0, 0.0
    with torch.autocast(operator.device.type, enabled=False):
        for held in range(width):
            known = basis[:held]
            if beta <= 100 * eps * scale:
                following = fresh()  # what is left of the last product is rounding
            for _ in range(2):
                following = following - (known @ following) @ known
            basis[held] = following / following.norm()
            known = basis[: held + 1]
            image = operator @ basis[held]
            column = known @ image
            following = image - column @ known
            correction = known @ following
            following = following - correction @ known
            entries = on_host(torch.cat([column + correction, following.norm()[None]]), operator)
            if not bool(torch.isfinite(entries).all()):
                raise NonFiniteError(f"a product with {type(operator).__name__} is not finite")
            projected[: held + 1, held] = projected[held, : held + 1] = entries[:-1]
            beta = float(entries[-1])
            scale = max(scale, beta, float(entries[:-1].abs().max()))
    values, weights = torch.linalg.eigh(projected)
    best = torch.arange(width - 1, max(width - 1 - count, -1), -1)
    vectors = basis.T @ weights[:, best].to(basis)
    return LeadingEigenpairs(values[best], vectors, beta * weights[-1, best].abs(), width)
