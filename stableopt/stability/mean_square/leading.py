"""`leading_directions`: a basis of leading eigenvectors, for second moments of large problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature import Operator, top_eigenpairs
from stableopt.curvature.eigen.top_eigenpairs import FEWEST_MORE

__all__ = ["leading_directions"]

_WIDER = 2
"""Products per requested eigenvector: the last Ritz vectors of a Krylov subspace have not converged."""

_TOL = 1e-6
"""Relative residual at which a search ends before all products are used."""


def leading_directions(operators: Sequence[Operator], count: int, *, seed: int) -> Tensor:
    """Return an orthonormal basis ``(d, k)`` of the ``count`` leading eigenvectors of each operator.

    Each operator takes at most ``2 count`` products, so the eigenvectors are approximate. Callers must
    use them for bounds that hold with any directions.
    """
    vectors = [
        top_eigenpairs(
            operator,
            count,
            tol=_TOL,
            max_iter=_WIDER * count,
            most_vectors=max(_WIDER * count, count + FEWEST_MORE),
            seed=seed + number,
        ).vectors
        for number, operator in enumerate(operators)
    ]
    # Nearly dependent columns are orthogonal only after a second QR decomposition.
    orthonormal: Tensor = torch.linalg.qr(torch.linalg.qr(torch.cat(vectors, dim=1)).Q).Q
    return orthonormal
