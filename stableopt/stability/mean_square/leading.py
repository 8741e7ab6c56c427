"""`leading_directions`: the directions that second moments are restricted to in large problems."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature import Operator, top_eigenpairs
from stableopt.curvature.eigen.top_eigenpairs import FEWEST_MORE

__all__ = ["leading_directions"]

_WIDER = 2
"""Products for each eigenvector asked for: the last ones of a Krylov space are far from any."""

_TOL = 1e-6
"""Relative residual at which a search ends before all products are used."""


def leading_directions(operators: Sequence[Operator], count: int, *, seed: int) -> Tensor:
    """Return an orthonormal basis ``(d, k)`` of each operator's ``count`` leading eigenvectors.

    The vectors are as accurate as ``2 count`` products make them: what is computed from them has to be
    a bound for any directions.
    """
    found = [
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
    basis = torch.cat(found, dim=1)
    # Twice, since the remainders of nearly dependent columns are orthogonal only then.
    orthonormal: Tensor = torch.linalg.qr(torch.linalg.qr(basis).Q).Q
    return orthonormal
