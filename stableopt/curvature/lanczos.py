r"""Lanczos with full reorthogonalisation and thick restarts, in the P inner product.

With covectors r and vectors q = P r, orthonormal in that :math:`q_i^\top r_j = \delta_{ij}`, a step is

.. math::

    w = Hq_j - \alpha_j r_j - \beta_{j-1} r_{j-1}, \quad z = Pw, \quad \beta_j = \sqrt{z^\top w},
    \quad r_{j+1} = w/\beta_j, \quad q_{j+1} = z/\beta_j

(Lanczos, 1950; Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*,
2000). It is Lanczos on :math:`P^{1/2}HP^{1/2}`, whose residual :math:`\beta_j|s_j|` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigenpair import Eigenpair, NonFiniteError, Preconditioner, small_enough
from stableopt.curvature.inner import Dual, check_norm, dual, scaled
from stableopt.curvature.operators import Operator

__all__ = ["lanczos"]

_BASIS = 40
"""Most vectors held. A full basis is restarted with its best Ritz vectors."""

_FIRST_ROWS = 8
"""Vectors that room is made for at first."""

_KEPT = 8
"""Ritz vectors kept by a restart."""

_AT_LEAST = 5


def lanczos(
    operator: Operator,
    first: Dual,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    max_iter: int,
) -> Eigenpair:
    """Return the top eigenpair of P H, from the pair ``first`` of norm 1."""
    size = operator.shape[0]
    eps = torch.finfo(operator.dtype).eps
    width = min(_BASIS, max_iter, size)
    # Rows are basis vectors, so that each is contiguous and a projection is one matrix product.
    covectors = _with_room(first.covector[None], min(_FIRST_ROWS, width))
    plain = preconditioner is None
    vectors = covectors if plain else _with_room(first.vector[None], len(covectors))
    projected = torch.zeros(width, width, dtype=torch.float64)
    held, products, scale, restarted = 1, 0, 0.0, False
    size_of_image = None
    while True:
        image = operator @ vectors[held - 1]
        products += 1
        if size_of_image is None:
            size_of_image = _magnitude(image)
        image = image / size_of_image
        # The last two hold nearly all that there is to remove, after a restart all do; what is left
        # of them by rounding goes with the second pass, over all.
        since = 0 if restarted else max(held - 2, 0)
        first_pass = vectors[since:held] @ image
        image.addmv_(covectors[since:held].T, first_pass, alpha=-1)
        coefficients = vectors[:held] @ image
        image.addmv_(covectors[:held].T, coefficients, alpha=-1)
        coefficients[since:] += first_pass
        rest = dual(image, preconditioner)
        column = torch.cat([coefficients, rest.norm[None], size_of_image[None]]).cpu().double()
        if not bool(torch.isfinite(column[:held]).all()):
            raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
        projected[:held, held - 1] = projected[held - 1, :held] = column[:held]
        beta, magnitude = float(column[held]), float(column[held + 1])
        check_norm(beta, preconditioner)
        values, weights = torch.linalg.eigh(projected[:held, :held])
        value, top = float(values[-1]), weights[:, -1]
        scale = max(scale, float(values.abs().max()), beta)
        residual = beta * abs(float(top[-1]))
        exhausted = held == size or beta == 0.0
        settled = products >= _AT_LEAST and small_enough(residual, value, scale, tol, eps)
        converged = exhausted or settled
        if converged or products == max_iter:
            vector = top.to(vectors) @ vectors[:held]
            return Eigenpair(
                value * magnitude,
                vector / vector.norm(),
                residual * magnitude,
                products,
                converged,
            )
        following = scaled(rest)
        if beta <= 100 * eps * scale:
            # Rounding is all that is left: a fresh direction, once it is orthogonal.
            fresh = following.covector
            fresh = fresh - (vectors[:held] @ fresh) @ covectors[:held]
            following = scaled(dual(fresh, preconditioner))
        restarted = held == width
        if restarted:
            held = min(_KEPT, width - 1)
            best = weights[:, -held:].T.to(covectors)
            covectors[:held] = best @ covectors
            if not plain:
                vectors[:held] = best @ vectors
            projected.zero_()
            projected[:held, :held] = torch.diag(values[-held:])
        elif held == len(covectors):
            rows = min(2 * held, width)
            covectors = _with_room(covectors, rows)
            vectors = covectors if plain else _with_room(vectors, rows)
        covectors[held] = following.covector
        if not plain:
            vectors[held] = following.vector
        held += 1


def _with_room(rows: Tensor, count: int) -> Tensor:
    """Return ``rows`` with room for ``count`` of them: a search may end after a few."""
    return torch.cat([rows, rows.new_empty(count - len(rows), rows.shape[1])])


def _magnitude(image: Tensor) -> Tensor:
    """Return a power of two near the largest entry: numbers over it can be squared."""
    largest = torch.linalg.vector_norm(image, float("inf"))
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return torch.where((largest > 0) & torch.isfinite(largest), power, torch.ones_like(largest))
