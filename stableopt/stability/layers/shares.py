r"""What a top eigenvector says at no further product: layers' shares, and the gradient's and step's.

With the unit top eigenvector v and the orthonormal directions :math:`V_k` that a search tracks,

.. math:: \sum_{j\in b} v_j^2, \qquad \|V_k^\top g\|^2/\|g\|^2, \qquad \|V_k^\top\delta\|^2/\|\delta\|^2,

for each block b, the gradient g, and the last step :math:`\delta`, all in the coordinates in which the
step is gradient descent: v is the eigenvector of :math:`P^{1/2}HP^{1/2}`, g becomes :math:`P^{1/2}g` and
:math:`\delta` becomes :math:`P^{-1/2}\delta`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.stability.layers.blocks import Block, layer_of
from stableopt.stability.layers.table import Layers

__all__ = ["Directions", "layer_shares", "of_directions", "sized", "whole_sizes"]


@dataclass(frozen=True)
class Directions:
    """The directions that one search found.

    Attributes:
        vector: the top eigenvector x ``(d,)``, of any length.
        covector: r with ``x = P r``, up to its length, where there is a preconditioner.
        tracked: orthonormal rows ``(k, d)``, covectors where there is a preconditioner; the top
            eigenvector alone if ``None``.
        gradient: the mean gradient ``(d,)``, if known.
        change: the last step ``(d,)``, if known.
    """

    vector: Tensor
    covector: Tensor | None = None
    tracked: Tensor | None = None
    gradient: Tensor | None = None
    change: Tensor | None = None


def of_directions(
    found: Directions,
    blocks: Sequence[Block],
    sizes: Sequence[int],
    inner: InnerProduct,
    *,
    counts: Sequence[int] | None = None,
    also: Tensor | None = None,
) -> tuple[Layers, dict[str, float], float]:
    """Return the shares of the blocks, and ``gradient_share`` and ``step_share`` as far as known.

    And the number ``also`` on the host.

    Args:
        found: the directions.
        blocks: the blocks.
        sizes: elements of each parameter, of this rank's part where vectors are sharded.
        inner: the inner product of the search, with its preconditioner.
        counts: elements of each parameter on all ranks; by default ``sizes``.
        also: another number on the device, which the same transfer takes.

    Takes one transfer from the device.
    """
    other = found.vector if found.covector is None else found.covector
    products = found.vector * other
    squares = torch.stack([part.sum() for part in torch.split(products, list(sizes))])
    if inner.sharded_size is not None:
        squares = inner.ranks.all_reduce_sum(squares)
    names, parts = [], [squares]
    for name, pair in (
        ("gradient_share", _of_gradient(found, inner)),
        ("step_share", _of_change(found, inner)),
    ):
        if pair is not None:
            names.append(name)
            parts.append(torch.stack(pair))
    last = squares.new_full((1,), math.nan) if also is None else also[None]
    numbers = inner.on_host(torch.cat([*parts, last]))
    own, pairs = numbers[: len(squares)], numbers[len(squares) : -1].view(-1, 2).tolist()
    total = float(own.sum()) or 1.0
    by_parameter = [value / total for value in own.tolist()]
    held = {place for block in blocks for place in block.places}
    rest = math.fsum(value for place, value in enumerate(by_parameter) if place not in held)
    counts = sizes if counts is None else counts
    column = tuple(math.fsum(by_parameter[p] for p in block.places) for block in blocks)
    layers = replace(sized(blocks, counts), columns={"share": column}, rest=rest)
    # A vector of length zero lies nowhere, and one on which P vanishes has no finite length.
    shares = zip(names, pairs, strict=True)
    return (
        layers,
        {name: inside / whole for name, (inside, whole) in shares if 0 < whole < math.inf},
        float(numbers[-1]),
    )


def sized(blocks: Sequence[Block], sizes: Sequence[int]) -> Layers:
    """Return the table of ``blocks`` without columns, from the elements of each parameter."""
    counts = (sum(sizes[place] for place in block.places) for block in blocks)
    return Layers(tuple(block.name for block in blocks), tuple(counts))


def whole_sizes(params: Iterable[Tensor]) -> list[int]:
    """Return the elements of each parameter on all ranks, a complex one's real and imaginary parts.

    >>> whole_sizes([torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64)])
    [6, 4]
    """
    return [p.numel() * (2 if p.is_complex() else 1) for p in params]


def _rows(found: Directions, inner: InnerProduct) -> Tensor:
    """Return orthonormal rows: vectors, or covectors where there is a preconditioner."""
    if found.tracked is not None:
        return found.tracked
    row = found.vector if found.covector is None else found.covector
    return inner.dual(row).normalised().covector[None]


def _of_gradient(found: Directions, inner: InnerProduct) -> tuple[Tensor, Tensor] | None:
    """Return the squared lengths of the gradient within the directions, and of all of it."""
    if found.gradient is None:
        return None
    own = inner.dual(found.gradient)
    return inner.dot(_rows(found, inner), own.vector).square().sum(), own.norm.square()


def _of_change(found: Directions, inner: InnerProduct) -> tuple[Tensor, Tensor] | None:
    if found.change is None or inner.preconditioner is not None:
        return None  # with P not diagonal its length needs the inverse of P
    inside = inner.dot(_rows(found, inner), found.change).square().sum()
    return inside, inner.norm(found.change).square()


def layer_shares(vector: Tensor, names: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    """Return the share of each layer in the squared norm of ``vector``, the largest first.

    Args:
        vector: a vector ``(d,)``, such as an eigenvector.
        names: of the parameters, in the order of the vector.
        sizes: their numbers of elements, which sum to d.

    Raises:
        ValueError: if the sizes do not sum to d.

    >>> layer_shares(torch.tensor([3.0, 0.0, 4.0]), ["0.weight", "0.bias", "1.weight"], [1, 1, 1])
    {'1': 0.64, '0': 0.36}
    """
    if sum(sizes) != vector.numel():
        raise ValueError(f"sizes sum to {sum(sizes)}: expected the {vector.numel()} of the vector")
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(layer_of(name), []).append(place)
    blocks = [Block(layer, tuple(at)) for layer, at in places.items()]
    shares = of_directions(Directions(vector), blocks, sizes, InnerProduct())[0]
    pairs = zip(shares.names, shares.columns["share"], strict=True)
    return dict(sorted(pairs, key=lambda item: -item[1]))
