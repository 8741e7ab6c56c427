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

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.follow_subspace import KEPT, subspace
from stableopt.curvature.eigen.inner_product import (
    Dual,
    check_norm,
    magnitude_of,
    normalised,
    on_host,
    scaled,
    whole_size,
)
from stableopt.curvature.eigen.result import UNCERTAINTY, Eigenpair, small_enough
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["lanczos"]

_RESTARTED = 8
"""Ritz vectors kept by a restart, or half of a basis that is smaller than twice that."""


def lanczos(
    operator: Operator,
    first: Dual,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    at_least: int,
    max_iter: int,
    uniform: bool,
    keep_for: int | None,
    most_vectors: int,
) -> Eigenpair:
    """Return the top eigenpair of P H, from the pair ``first`` of norm 1.

    ``at_least`` so many products are taken before a small residual is believed. ``uniform`` says
    that ``first`` was drawn as the upper bound has it. With a seed ``keep_for`` the result has its
    subspace. A basis of ``most_vectors`` is restarted with its best Ritz vectors.
    """
    size = whole_size(operator.shape[0])
    eps = torch.finfo(operator.dtype).eps
    width = min(most_vectors, max_iter, size)
    basis = Basis(first.covector[None], first.vector[None], preconditioner, most=width)
    projected = torch.zeros(width, width, dtype=torch.float64)
    products, scale, smallest, restarted, magnitude = 0, 0.0, math.inf, False, None
    while True:
        image = operator @ basis.vectors[-1]
        products += 1
        magnitude = magnitude_of(image) if magnitude is None else magnitude
        held = basis.held
        # The last two rows hold nearly all that there is to remove; after a restart all do.
        coordinates, rest = basis.split(image / magnitude, 0 if restarted else max(held - 2, 0))
        column = on_host(torch.cat([coordinates, rest.norm[None], magnitude[None]]), operator)
        if not bool(torch.isfinite(column[:held]).all()):
            raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
        projected[:held, held - 1] = projected[held - 1, :held] = column[:held]
        beta, unit = column[held:].tolist()
        check_norm(beta, preconditioner)
        values, weights = torch.linalg.eigh(projected[:held, :held])
        value, top = float(values[-1]), weights[:, -1]
        scale = max(scale, float(values.abs().max()), beta)
        smallest = min(smallest, float(values[0]))
        residual = beta * abs(float(top[-1]))
        exhausted = held == size or beta == 0.0
        settled = products >= at_least and small_enough(residual, value, scale, tol, eps)
        if exhausted or settled or products == max_iter:
            break
        following = scaled(rest)
        if beta <= 100 * eps * scale:
            # Rounding is all that is left: a fresh direction, once it is orthogonal.
            following = basis.orthogonal(following.covector)
        restarted = held == width
        if restarted:
            best = min(_RESTARTED, max(width // 2, 1))
            basis = basis.combined(weights[:, -best:].T, room=width - best)
            projected.zero_()
            projected[:best, :best] = torch.diag(values[-best:])
        basis.append(following)

    bound = None
    if exhausted:
        bound = value + residual
    elif uniform:
        bound = _upper_bound(value, smallest, min(products, width), size)
    kept = None
    if keep_for is not None:
        ritz = basis.combined(weights[:, 1 - KEPT :].T.flip(0), room=1)
        beyond = rest.covector / rest.norm if beta > 0 else torch.zeros_like(rest.covector)
        kept = subspace(ritz, beyond, keep_for)
    vector = basis.vector(top)
    return Eigenpair(
        value * unit,
        normalised(vector),
        residual * unit,
        products,
        exhausted or settled,
        None if bound is None else bound * unit,
        kept,
    )


def _upper_bound(largest: float, smallest: float, products: int, size: int) -> float | None:
    """Return the bound of :class:`Eigenpair` for Ritz values of so many products, if there is one."""
    needed = math.log(2 * 1.648 * math.sqrt(size) / UNCERTAINTY) / (2 * products - 1)
    epsilon = needed**2
    if epsilon >= 0.5:
        return None
    return largest + epsilon / (1 - 2 * epsilon) * (largest - smallest)
