r"""Shares of the top eigenvector by layer, and of gradient and step in the tracked subspace.

With the unit top eigenvector v and an orthonormal basis :math:`V_k` of the tracked subspace, these are

.. math:: \sum_{j\in b} v_j^2, \qquad \|V_k^\top g\|^2/\|g\|^2, \qquad \|V_k^\top\delta\|^2/\|\delta\|^2,

for each block b, the gradient g, and the last step :math:`\delta`, all in the coordinates in which the
step is gradient descent: v is the eigenvector of :math:`P^{1/2}HP^{1/2}`, g becomes :math:`P^{1/2}g` and
:math:`\delta` becomes :math:`P^{-1/2}\delta`. They take no further Hessian-vector product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.stability.layers.blocks import Block
from stableopt.stability.layers.table import Layers

__all__ = ["Directions", "full_sizes", "shares_of", "without_columns"]


@dataclass(frozen=True)
class Directions:
    """The result of one eigen-search, with the gradient and the last step.

    Attributes:
        vector: the top eigenvector x ``(d,)``, of any norm.
        covector: with a preconditioner P, the r of ``x = P r``, of any norm; else ``None``.
        tracked: orthonormal rows ``(k, d)``, covectors if there is a preconditioner; ``None`` for the
            top eigenvector alone.
        gradient: the mean gradient ``(d,)``, or ``None``.
        change: the last step ``(d,)``, or ``None``.
    """

    vector: Tensor
    covector: Tensor | None = None
    tracked: Tensor | None = None
    gradient: Tensor | None = None
    change: Tensor | None = None


def shares_of(
    directions: Directions,
    blocks: Sequence[Block],
    sizes: Sequence[int],
    inner: InnerProduct,
    *,
    counts: Sequence[int] | None = None,
    extra: Tensor | None = None,
) -> tuple[Layers, dict[str, float], float]:
    """Return the blocks' shares; ``gradient_share`` and ``step_share`` if known; ``extra`` as a float.

    Args:
        directions: the eigenvector, the tracked subspace, the gradient and the step.
        blocks: the blocks.
        sizes: elements of each parameter, those on this rank if vectors are sharded.
        inner: the inner product of the search, with its preconditioner.
        counts: elements of each parameter on all ranks; by default ``sizes``.
        extra: another number on the device, which joins the single host transfer.
    """
    dual = directions.vector if directions.covector is None else directions.covector
    products = directions.vector * dual
    squares = torch.stack([part.sum() for part in torch.split(products, list(sizes))])
    if inner.sharded_size is not None:
        squares = inner.ranks.all_reduce_sum(squares)
    projections = {
        "gradient_share": _projected_gradient(directions, inner),
        "step_share": _projected_change(directions, inner),
    }
    names = [name for name, pair in projections.items() if pair is not None]
    pairs = [torch.stack(pair) for pair in projections.values() if pair is not None]
    last = squares.new_full((1,), math.nan) if extra is None else extra[None]
    numbers = inner.on_host(torch.cat([squares, *pairs, last]))
    host_squares = numbers[: len(squares)]
    total = float(host_squares.sum()) or 1.0
    by_parameter = [value / total for value in host_squares.tolist()]
    in_blocks = {index for block in blocks for index in block.indices}
    rest = math.fsum(value for index, value in enumerate(by_parameter) if index not in in_blocks)
    column = tuple(math.fsum(by_parameter[p] for p in block.indices) for block in blocks)
    table = without_columns(blocks, sizes if counts is None else counts)
    shares = {}
    host_pairs = numbers[len(squares) : -1].view(-1, 2).tolist()
    for name, (projected, whole) in zip(names, host_pairs, strict=True):
        # The norm is infinite if P vanishes on the vector.
        if 0 < whole < math.inf:
            shares[name] = projected / whole
    return replace(table, columns={"share": column}, rest=rest), shares, float(numbers[-1])


def without_columns(blocks: Sequence[Block], sizes: Sequence[int]) -> Layers:
    """Return the table of ``blocks`` without columns, from the elements of each parameter."""
    counts = (sum(sizes[index] for index in block.indices) for block in blocks)
    return Layers(tuple(block.name for block in blocks), tuple(counts))


def full_sizes(params: Iterable[Tensor]) -> list[int]:
    """Return the number of real elements of each parameter on all ranks; two for a complex element.

    >>> full_sizes([torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64)])
    [6, 4]
    """
    return [p.numel() * (2 if p.is_complex() else 1) for p in params]


def _basis(directions: Directions, inner: InnerProduct) -> Tensor:
    """Return orthonormal rows ``(k, d)``: vectors, or covectors if there is a preconditioner."""
    if directions.tracked is not None:
        return directions.tracked
    row = directions.vector if directions.covector is None else directions.covector
    return inner.dual(row).normalised().covector[None]


def _projected_gradient(
    directions: Directions, inner: InnerProduct
) -> tuple[Tensor, Tensor] | None:
    """Return the squared norms of the gradient's projection on the basis, and of the gradient."""
    if directions.gradient is None:
        return None
    gradient = inner.dual(directions.gradient)
    projection = inner.dot(_basis(directions, inner), gradient.vector)
    return projection.square().sum(), gradient.norm.square()


def _projected_change(directions: Directions, inner: InnerProduct) -> tuple[Tensor, Tensor] | None:
    """Return the squared norms of the step's projection on the basis, and of the step."""
    if directions.change is None or inner.preconditioner is not None:
        return None  # the step's norm would need the inverse of P
    projection = inner.dot(_basis(directions, inner), directions.change)
    return projection.square().sum(), inner.norm(directions.change).square()
