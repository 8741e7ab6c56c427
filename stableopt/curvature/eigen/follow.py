r"""Following the top eigenpair from one measurement to the next, in three products where little moved.

What is kept of a measurement is a subspace: nine Ritz vectors :math:`u_1, u_2, \dots` and an explorer
f, orthonormal. The next measurement takes

1. the product with :math:`u_1`, which gives its Rayleigh quotient and its residual;
2. one with a probe :math:`p = \sum_{j\ge2} \pm c_j u_j`, f included. Where the :math:`u_j` are still
   near eigenvectors, :math:`u_j^\top Ap / c_j` are *all* their Rayleigh quotients, of one product;
3. one with what is now thought to be the top Ritz vector, if the residual is too large or another
   eigenvalue seems to have overtaken; else with the runner-up, if it may have, with f, or with one of
   the :math:`u_j`, by chance.

More follow while the residual is too large or an overtaking is likely, and at times, by chance, two
with f and one of the :math:`u_j`. What is *thought* is the projection of A on all directions at hand:
the estimates on its diagonal, and the least symmetric change that agrees with every product (Powell's
update, 1970, as quasi-Newton methods have it). What is *reported* comes from the products of this
measurement alone: the Rayleigh–Ritz value in the span of the tested directions, and its residual.

Certain, up to rounding: the value is at most the largest eigenvalue, and an eigenvalue is within the
residual of it. Only probable: that it is the largest. A kept direction that overtakes is missed where
the estimates err. One never seen before grows in f as in a power iteration with the others deflated,
a step or less a measurement, so that a sudden one takes several measurements or a start afresh; no
method that takes three products of ten thousand dimensions can do otherwise.

In 50 measurements of each of twenty families that none of the constants was chosen on, d = 2,000, one
start afresh, eigenvectors at rest or turning by 0.05 between measurements, the median was 3 products,
the mean 3.3, the most 9. Where all eigenvalues grew by 2 % each time, at most 0.3 % was lost; where they
dropped by up to 65 % at once, 1 of 2,000 measurements lost more than 3 %, and it 7 %. Where the second,
the sixth or one out of the bulk rose by 3 % of the top each time until it had overtaken, 1 in 115
lost more than 3 %, the worst 10 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.follow_model import Projection, probe
from stableopt.curvature.eigen.follow_subspace import restored, subspace
from stableopt.curvature.eigen.inner_product import (
    Dual,
    check_norm,
    magnitude_of,
    normalised,
    on_host,
)
from stableopt.curvature.eigen.result import Eigenpair, small_enough
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["track"]

_AT_LEAST = 3

_PATIENCE = 9
"""Products after which what is kept no longer helps, and a search from nothing does."""


def track(
    operator: Operator,
    kept: Tensor,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    max_iter: int,
    seed: int,
    keep: bool,
) -> Eigenpair | None:
    """Return the top eigenpair from an earlier ``subspace`` ``(k, d)``; ``max_iter`` is at least 2.

    ``None`` where ``kept`` does not span k directions. Not converged where what is kept no longer
    helps.
    """
    basis = restored(kept, preconditioner, operator)
    if basis is None:
        return None
    eps = torch.finfo(operator.dtype).eps
    chance = torch.Generator().manual_seed(seed)
    weights = probe(len(kept), chance)
    # Neither of the first two products waits for the other.
    image, probed = (operator @ v for v in (basis.vectors[0], basis.vector(weights)))
    magnitude = magnitude_of(image)
    columns = [_absorb(basis, image / magnitude), _absorb(basis, probed / magnitude)]
    both = on_host(torch.cat([*columns, magnitude[None]]), operator)
    unit = float(both[-1])
    first, second = torch.split(both[:-1], [len(column) for column in columns])
    _check(first, 1, operator, preconditioner)
    _check(second, 2, operator, preconditioner)
    projection, products = Projection(weights, first, second, chance), 2
    while True:
        value, best, residual, scale = projection.top()
        settled = small_enough(residual, value, scale, tol, eps)
        if products >= min(max_iter, _PATIENCE):
            break
        direction = projection.direction(value, settled, products >= _AT_LEAST)
        if direction is None:
            break
        column = on_host(_absorb(basis, operator @ basis.vector(direction) / magnitude), operator)
        products += 1
        _check(column, products, operator, preconditioner)
        projection.learn(direction, column)
    vector = basis.vector(best)
    following = None
    if keep:
        ritz = projection.expected()[1][: len(kept) - 1]
        beside = projection.explorer(ritz).to(kept) @ basis.covectors
        following = subspace(basis.combined(ritz, room=1), beside, seed)
    return Eigenpair(
        value * unit,
        normalised(vector),
        residual * unit,
        products,
        settled and not projection.overtaken(value),
        subspace=following,
    )


def _absorb(basis: Basis, image: Tensor) -> Tensor:
    """Add what the basis lacks of an image as a row; return all its coordinates, on the device."""
    coordinates, rest = basis.split(image)
    # A rest that is rounding alone would not be orthogonal: it becomes a row of zeros. That of a
    # norm below zero or NaN is left for the check.
    rounding = 100 * torch.finfo(image.dtype).eps * coordinates.norm()
    nothing = (rest.norm >= 0) & (rest.norm <= rounding)
    norm = torch.where(nothing, 0.0, rest.norm)
    covector = torch.where(nothing, 0.0, rest.covector / rest.norm)
    vector = covector
    if basis.preconditioner is not None:
        vector = torch.where(nothing, 0.0, rest.vector / rest.norm)
    basis.append(Dual(covector, vector, norm))
    return torch.cat([coordinates, norm[None]])


def _check(
    column: Tensor, products: int, operator: Operator, preconditioner: Preconditioner | None
) -> None:
    if not bool(torch.isfinite(column[:-1]).all()):
        raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
    check_norm(float(column[-1]), preconditioner)
