"""What one search leaves to the next: Ritz vectors, and a direction to explore."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.inner_product import dot, dual, noise, on_host, scaled, whole_size
from stableopt.curvature.operator import Preconditioner

__all__ = ["KEPT", "followable", "restored", "subspace"]

KEPT = 10
"""Directions kept, the one to explore among them. With eight, eigenvalues that rose from below the
tenth were lost three times as often."""

_FEWEST = 3

_ROOM = 5
"""Images that room is made for at first: as many as are mostly taken."""

_SMALL = 3 * KEPT
"""Size below which a whole search is no dearer than following."""

_FRESH = 0.1
"""Norm of the noise mixed into the explorer, in which a direction never seen before begins."""


def subspace(ritz: Basis, explorer: Tensor, seed: int) -> Tensor:
    """Return what to keep ``(k, d)``: covectors of Ritz vectors, and of the explorer with noise.

    ``explorer`` ``(d,)`` has norm 1, or is zero. It is added to ``ritz``.
    """
    if whole_size(len(explorer)) < _SMALL:
        return ritz.covectors
    fresh = noise(len(explorer), explorer.dtype, explorer.device, seed)
    mixed = explorer + _FRESH * scaled(dual(fresh, ritz.preconditioner)).covector
    ritz.append(ritz.orthogonal(mixed))
    return ritz.covectors


def followable(kept: Tensor) -> bool:
    """Return whether ``kept`` is enough to follow, in a space that is not small."""
    rows, size = kept.shape
    return _FEWEST <= rows <= KEPT and whole_size(size) >= _SMALL


def restored(kept: Tensor, preconditioner: Preconditioner | None, operator: Any) -> Basis | None:
    """Return ``kept`` as an orthonormal basis, or ``None`` if its rows do not span as many."""
    vectors = kept if preconditioner is None else torch.stack([preconditioner @ r for r in kept])
    gram = on_host(torch.stack([dot(vectors, row) for row in kept]), operator)
    lower, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    # What P has changed since, and rounding, is put right; a lost direction is not.
    if int(failed) or not float(lower.diagonal().min()) > 1e-3 * float(lower.diagonal().max()):
        return None
    identity = torch.eye(len(kept), dtype=torch.float64)
    weights = torch.linalg.solve_triangular(lower, identity, upper=False)
    return Basis(kept, vectors, preconditioner).combined(weights, room=_ROOM)
