"""The subspace kept from one search for the next: Ritz vectors and a direction to explore."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.inner_product import InnerProduct

__all__ = ["KEPT", "basis_of_kept", "followable", "ritz_rows", "subspace_to_keep"]

KEPT = 10
"""Directions kept, including the one to explore. With eight, eigenvalues that rose from below the tenth
were lost three times as often."""

_FEWEST = 3
"""Fewest rows of a subspace that can be followed."""

_ROOM = 5
"""Free rows allocated for products: most searches need no more."""

_SMALL = 3 * KEPT
"""Size below which a search from scratch costs no more than following."""

_FRESH = 0.1
"""Norm of the noise mixed into the explorer; directions outside the subspace enter through it."""


def subspace_to_keep(ritz: Basis, explorer: Tensor, seed: int) -> Tensor:
    """Return the subspace to keep ``(k, d)``: the covectors of ``ritz``, and the explorer with noise.

    ``explorer`` ``(d,)`` has norm 1, or is zero. It is appended to ``ritz``, in place. In fewer than 30
    dimensions it is left out.
    """
    if ritz.inner.whole_size(len(explorer)) < _SMALL:
        return ritz.covectors
    mixed = explorer + _FRESH * ritz.inner.noise(explorer, seed).covector
    ritz.append(ritz.orthogonal(mixed))
    return ritz.covectors


def followable(kept: Tensor, inner: InnerProduct) -> bool:
    """Return whether ``kept`` can be followed: 3 to 10 rows, in at least 30 dimensions."""
    rows, size = kept.shape
    return _FEWEST <= rows <= KEPT and inner.whole_size(size) >= _SMALL


def ritz_rows(kept: Tensor, inner: InnerProduct) -> Tensor:
    """Return the Ritz vectors among the rows of ``kept``: all but the direction to explore."""
    return kept if inner.whole_size(kept.shape[1]) < _SMALL else kept[:-1]


def basis_of_kept(kept: Tensor, inner: InnerProduct, room: int = _ROOM) -> tuple[Basis, Tensor]:
    """Return an orthonormal basis of the rows of ``kept``, and a flag: 1 if they are linearly dependent.

    The flag stays on the device, so that no host transfer is needed. At 1 the rows are unchanged.
    """
    P = inner.preconditioner
    vectors = kept if P is None else torch.stack([P @ row for row in kept])
    gram = inner.ranks.broadcast(torch.stack([inner.dot(vectors, row) for row in kept]))
    gram = gram.to(torch.float32 if kept.device.type == "mps" else torch.float64)
    lower, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    # Cholesky orthonormalisation corrects rounding and a changed P, but cannot recover a lost direction.
    diagonal = lower.diagonal()
    dependent = (failed != 0) | ~(diagonal.min() > 1e-3 * diagonal.max())
    identity = torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve_triangular(lower, identity, upper=False)
    weights = torch.where(dependent, identity, weights)
    return Basis(kept, vectors, inner).combined(weights, room=room), dependent.to(kept.dtype)
