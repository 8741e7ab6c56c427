r"""`follow`: the top eigenpair from an earlier subspace, in about three products if little moved.

A search keeps a subspace: nine Ritz vectors :math:`u_1, u_2, \dots` and an explorer f, orthonormal. The
next search takes

1. the product with :math:`u_1`, which gives its Rayleigh quotient and its residual;
2. one with a probe :math:`p = \sum_{j\ge2} \pm c_j u_j`, including f. While the :math:`u_j` are near
   eigenvectors, :math:`u_j^\top Ap / c_j` estimates *every* Rayleigh quotient, from one product;
3. one with the estimated top Ritz vector, if the residual is too large or another eigenvalue seems to
   have overtaken; else with the runner-up, if that may have overtaken, or with f.

More products follow while the residual is too large or an overtaking is likely. At random, two more
explore.
The *estimate* is a projection of A on all known directions: the estimated Rayleigh quotients on its
diagonal, and the least symmetric change that agrees with every product (Powell's update, 1970, as in
quasi-Newton methods). The *result* comes from the products of this search alone: the Rayleigh–Ritz value
in the span of the tested directions, and its residual.

The value is at most the largest eigenvalue, and an eigenvalue lies within the residual of it, up to
rounding. That this eigenvalue is the largest is only probable. A kept direction that has overtaken is
missed if the estimates are wrong. A direction outside the subspace grows in f as in a power iteration
with the kept directions deflated: a sudden change takes several searches, or one from scratch.

Measured on 12 families of each kind (d = 1,000, the first search from scratch, eigenvectors fixed or
turning by 0.05 between searches): 3 products in the median, 3.4 in the mean. Where the second, the sixth
or a bulk eigenvalue rose by 3 % of the top per search until it had overtaken, 1.4 % of searches were
more than 3 % too low, at worst 9 %. Where a bulk eigenvalue rose by 10 % or 30 % of itself per search,
2 % and 4 % were, at worst 38 %. One that jumped to 1.5 times the top was missed by up to three
searches, which were 33 % too low.
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
"""Products taken before linearly dependent rows are detected."""

_AT_LEAST = 3
"""Fewest products of a search."""

_PATIENCE = 9
"""Most products of a search: beyond these, one from scratch is faster."""


def follow(search: Search, kept: Tensor, max_iter: int) -> Eigenpair | None:
    """Return the top eigenpair, starting from ``kept`` ``(k, d)``, the subspace of an earlier result.

    ``None``, after :data:`ASKED` products, if the rows of ``kept`` are linearly dependent. The result
    has not converged if ``kept`` is too far from the present eigenvectors. ``max_iter`` is at least 2.
    """
    operator, inner = search.operator, search.inner
    basis, dependent = basis_of_kept(kept, inner)
    generator = torch.Generator().manual_seed(search.seed)
    weights = probe(len(kept), generator)
    # The first two products need one host transfer: neither depends on the other's numbers.
    top_image, probe_image = (operator @ v for v in (basis.vectors[0], basis.vector(weights)))
    magnitude = inner.magnitude(top_image)
    columns = [
        _append_image(basis, top_image / magnitude),
        _append_image(basis, probe_image / magnitude),
    ]
    del top_image, probe_image
    numbers = inner.on_host(torch.cat([*columns, torch.stack([magnitude, dependent])]))
    unit, rows_are_dependent = numbers[-2:].tolist()
    if rows_are_dependent:
        return None
    first, second = torch.split(numbers[:-2], [len(column) for column in columns])
    inner.check_product(first[:-1], float(first[-1]), 1, operator)
    inner.check_product(second[:-1], float(second[-1]), 2, operator)
    projection, products = EstimatedProjection(weights, first, second, generator), 2
    while True:
        value, top, residual, scale = projection.tested_top()
        settled = search.is_small(residual, value, scale)
        if products >= min(max_iter, _PATIENCE):
            break
        direction = projection.next_direction(value, settled, products >= _AT_LEAST)
        if direction is None:
            break
        image = operator @ basis.vector(direction)
        column = inner.on_host(_append_image(basis, image / magnitude))
        products += 1
        inner.check_product(column[:-1], float(column[-1]), products, operator)
        projection.learn(direction, column)
    vector, covector, subspace = basis.unit_vector(top), basis.covector(top), None
    if search.keep:
        ritz = projection.estimated_pairs()[1][: len(kept) - 1]
        explorer = projection.explorer(ritz).to(kept) @ basis.covectors
        subspace = subspace_to_keep(basis.combined(ritz, room=1), explorer, search.seed)
    return Eigenpair(
        value * unit,
        vector,
        residual * unit,
        products,
        settled and not projection.overtaken(value),
        subspace=subspace,
        covector=covector,
    )


def _append_image(basis: Basis, image: Tensor) -> Tensor:
    """Append a product's component orthogonal to the basis; return all coordinates, on the device."""
    coordinates, outside = basis.split(image)
    # A component that is only rounding error would not be orthogonal: division by infinity makes it a
    # row of zeros. A negative norm or NaN remains, for the check.
    rounding = 100 * torch.finfo(image.dtype).eps * coordinates.norm()
    negligible = (outside.norm >= 0) & (outside.norm <= rounding)
    divisor = torch.where(negligible, torch.inf, outside.norm)
    basis.append(outside._replace(norm=divisor).normalised())
    return torch.cat([coordinates, torch.where(negligible, 0.0, outside.norm)[None]])
