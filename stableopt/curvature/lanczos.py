r"""Lanczos with full reorthogonalisation and thick restarts, in the P inner product.

With covectors r and vectors q = P r, orthonormal in that :math:`q_i^\top r_j = \delta_{ij}`, a step is

.. math::

    w = Hq_j - \alpha_j r_j - \beta_{j-1} r_{j-1}, \quad z = Pw, \quad \beta_j = \sqrt{z^\top w},
    \quad r_{j+1} = w/\beta_j, \quad q_{j+1} = z/\beta_j

(Lanczos, 1950; Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems*,
2000). It is Lanczos on :math:`P^{1/2}HP^{1/2}`, whose residual :math:`\beta_j|s_j|` is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stableopt.curvature.eigenpair import (
    UNCERTAINTY,
    Eigenpair,
    NonFiniteError,
    Preconditioner,
    small_enough,
)
from stableopt.curvature.inner import Dual, check_norm, dual, magnitude_of, scaled
from stableopt.curvature.operators import Operator
from stableopt.curvature.tracking import KEPT, subspace

__all__ = ["lanczos"]

_BASIS = 40
"""Most vectors held. A full basis is restarted with its best Ritz vectors."""

_FIRST_ROWS = 8
"""Vectors that room is made for at first."""

_KEPT = 8
"""Ritz vectors kept by a restart."""

AT_LEAST = {"random": 12, "near": 5}
"""Products before a small residual is believed: beside some other eigenvector it is small too. In
random starts eight products with tol=0.03 were seen to stop at the second eigenvalue, 5 % low; a
start near an eigenvector has a small residual from the beginning, and only further products show
whether a larger eigenvalue hides in the noise."""


def lanczos(
    operator: Operator,
    first: Dual,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    max_iter: int,
    random: bool,
    keep_for: int | None,
) -> Eigenpair:
    """Return the top eigenpair of P H, from the pair ``first`` of norm 1.

    ``random`` says that ``first`` is; with a seed ``keep_for`` the result has its subspace.
    """
    at_least = AT_LEAST["random" if random else "near"]
    size = operator.shape[0]
    eps = torch.finfo(operator.dtype).eps
    width = min(_BASIS, max_iter, size)
    # Rows are basis vectors, so that each is contiguous and a projection is one matrix product.
    covectors = _with_room(first.covector[None], min(_FIRST_ROWS, width))
    plain = preconditioner is None
    vectors = covectors if plain else _with_room(first.vector[None], len(covectors))
    projected = torch.zeros(width, width, dtype=torch.float64)
    held, products, scale, smallest, restarted = 1, 0, 0.0, math.inf, False
    magnitude = None
    while True:
        image = operator @ vectors[held - 1]
        products += 1
        if magnitude is None:
            magnitude = magnitude_of(image)
        image = image / magnitude
        # The last two hold nearly all that there is to remove, after a restart all do; what is left
        # of them by rounding goes with the second pass, over all.
        since = 0 if restarted else max(held - 2, 0)
        first_pass = vectors[since:held] @ image
        image.addmv_(covectors[since:held].T, first_pass, alpha=-1)
        coefficients = vectors[:held] @ image
        image.addmv_(covectors[:held].T, coefficients, alpha=-1)
        coefficients[since:] += first_pass
        rest = dual(image, preconditioner)
        column = torch.cat([coefficients, rest.norm[None], magnitude[None]]).cpu().double()
        if not bool(torch.isfinite(column[:held]).all()):
            raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
        projected[:held, held - 1] = projected[held - 1, :held] = column[:held]
        beta, unit = float(column[held]), float(column[held + 1])
        check_norm(beta, preconditioner)
        values, weights = torch.linalg.eigh(projected[:held, :held])
        value, top = float(values[-1]), weights[:, -1]
        scale = max(scale, float(values.abs().max()), beta)
        smallest = min(smallest, float(values[0]))
        residual = beta * abs(float(top[-1]))
        exhausted = held == size or beta == 0.0
        settled = products >= at_least and small_enough(residual, value, scale, tol, eps)
        converged = exhausted or settled
        if converged or products == max_iter:
            vector = top.to(vectors) @ vectors[:held]
            bound = None
            if exhausted:
                bound = value + residual
            elif random and plain:
                bound = _upper_bound(value, smallest, min(products, width), size)
            kept = None
            if keep_for is not None:
                best = weights[:, 1 - KEPT :].T.flip(0).to(covectors)
                ritz = best @ covectors[:held]
                ritz_vectors = ritz if plain else best @ vectors[:held]
                beyond = rest.covector / rest.norm if beta > 0 else torch.zeros_like(image)
                kept = subspace(
                    Dual(ritz, ritz_vectors, rest.norm), beyond, preconditioner, keep_for
                )
            return Eigenpair(
                value * unit,
                vector / vector.norm(),
                residual * unit,
                products,
                converged,
                None if bound is None else bound * unit,
                kept,
            )
        following = scaled(rest)
        if beta <= 100 * eps * scale:
            # Rounding is all that is left: a fresh direction, once it is orthogonal.
            fresh = following.covector
            for _ in range(2):
                fresh = fresh - (vectors[:held] @ fresh) @ covectors[:held]
                fresh /= fresh.norm()
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


def _upper_bound(largest: float, smallest: float, products: int, size: int) -> float | None:
    """Return the bound of :class:`Eigenpair`, or ``None`` where there is none."""
    needed = math.log(2 * 1.648 * math.sqrt(size) / UNCERTAINTY) / (2 * products - 1)
    epsilon = needed**2
    if epsilon >= 0.5:
        return None
    return largest + epsilon / (1 - 2 * epsilon) * (largest - smallest)
