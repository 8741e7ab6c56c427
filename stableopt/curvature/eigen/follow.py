r"""`follow`: the top eigenpair from what an earlier search kept, in three products where little moved.

A search keeps a subspace: nine Ritz vectors :math:`u_1, u_2, \dots` and an explorer f, orthonormal. The
next search takes

1. the product with :math:`u_1`, which gives its Rayleigh quotient and its residual;
2. one with a probe :math:`p = \sum_{j\ge2} \pm c_j u_j`, including f. While the :math:`u_j` are near
   eigenvectors, :math:`u_j^\top Ap / c_j` estimates *every* Rayleigh quotient, from one product;
3. one with the estimated top Ritz vector, if the residual is too large or another eigenvalue seems to
   have overtaken; else with the runner-up, if that may have overtaken, or with f.

More follow while the residual is too large or an overtaking is likely, and at random two more explore.
The *estimate* is a projection of A on all known directions: the estimated Rayleigh quotients on its
diagonal, and the least symmetric change that agrees with every product (Powell's update, 1970, as in
quasi-Newton methods). The *result* comes from the products of this search alone: the Rayleigh–Ritz value
in the span of the tested directions, and its residual.

Certain, up to rounding: the value is at most the largest eigenvalue, and an eigenvalue lies within the
residual of it. Only probable: that this is the largest. A kept direction that overtakes is missed where
the estimates err. A direction never seen before grows in f as in a power iteration with the others
deflated, so that a sudden one takes several searches or one from scratch. Three products in ten thousand
dimensions cannot do better.

Over 12 families of each kind (d = 1,000, the first search from scratch, eigenvectors at rest or
turning by 0.05 between searches) the median was 3 products, the mean 3.4. Where the second, the sixth or
one out of the bulk rose by 3 % of the top each time until it had overtaken, 1.4 % of searches lost more
than 3 %, at worst 9 %. Where one out of the bulk rose by 10 % or 30 % of itself each time, 1.9 % and
3.5 % did, at worst 20 %. One that jumped to 1.5 times the top was missed by up to three searches, which
lost 33 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.basis import Basis
from stableopt.curvature.eigen.estimated_projection import EstimatedProjection, probe
from stableopt.curvature.eigen.kept_subspace import basis_of_kept, subspace_to_keep
from stableopt.curvature.eigen.result import Eigenpair, Search

__all__ = ["ASKED", "follow"]

ASKED = 2
"""Products after which the subspace is known to be one to follow."""

_AT_LEAST = 3

_PATIENCE = 9
"""Products after which the kept subspace no longer helps, and a search from scratch does."""


def follow(search: Search, kept: Tensor, max_iter: int) -> Eigenpair | None:
    """Return the top eigenpair from an earlier ``subspace`` ``(k, d)``; ``max_iter`` is at least 2.

    It is ``None``, after :data:`ASKED` products, if the rows of ``kept`` are linearly dependent, and not
    converged if ``kept`` no longer helps.
    """
    operator, inner = search.operator, search.inner
    basis, dependent = basis_of_kept(kept, inner)
    generator = torch.Generator().manual_seed(search.seed)
    weights = probe(len(kept), generator)
    # Neither of the first two products waits for the other.
    image, probed = (operator @ v for v in (basis.vectors[0], basis.vector(weights)))
    magnitude = inner.magnitude(image)
    columns = [_absorb(basis, image / magnitude), _absorb(basis, probed / magnitude)]
    both = inner.on_host(torch.cat([*columns, torch.stack([magnitude, dependent])]))
    unit, failed = both[-2:].tolist()
    if failed:
        return None
    first, second = torch.split(both[:-2], [len(column) for column in columns])
    inner.check_product(first[:-1], float(first[-1]), 1, operator)
    inner.check_product(second[:-1], float(second[-1]), 2, operator)
    projection, products = EstimatedProjection(weights, first, second, generator), 2
    while True:
        value, best, residual, scale = projection.tested_top()
        settled = search.small_enough(residual, value, scale)
        if products >= min(max_iter, _PATIENCE):
            break
        direction = projection.next_direction(value, settled, products >= _AT_LEAST)
        if direction is None:
            break
        image = operator @ basis.vector(direction)
        column = inner.on_host(_absorb(basis, image / magnitude))
        products += 1
        inner.check_product(column[:-1], float(column[-1]), products, operator)
        projection.learn(direction, column)
    vector, covector, following = basis.unit_vector(best), basis.covector(best), None
    if search.keep:
        ritz = projection.estimated_pairs()[1][: len(kept) - 1]
        explorer = projection.explorer(ritz).to(kept) @ basis.covectors
        following = subspace_to_keep(basis.combined(ritz, room=1), explorer, search.seed)
    return Eigenpair(
        value * unit,
        vector,
        residual * unit,
        products,
        settled and not projection.overtaken(value),
        subspace=following,
        covector=covector,
    )


def _absorb(basis: Basis, image: Tensor) -> Tensor:
    """Append the rest of an image outside the basis; return all its coordinates, on the device."""
    coordinates, rest = basis.split(image)
    # A rest that is rounding alone would not be orthogonal: over infinity it is a row of zeros. One
    # with a norm below zero or NaN is left for the check.
    rounding = 100 * torch.finfo(image.dtype).eps * coordinates.norm()
    negligible = (rest.norm >= 0) & (rest.norm <= rounding)
    basis.append(rest._replace(norm=torch.where(negligible, torch.inf, rest.norm)).normalised())
    return torch.cat([coordinates, torch.where(negligible, 0.0, rest.norm)[None]])
