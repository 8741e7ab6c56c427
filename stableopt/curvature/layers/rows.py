r"""`along_rows`: products with per-sample matrices of low rank, without forming the matrices.

Let l and r be the rows of a linear map at each position t, y the indices of lookups in the same matrix,
and u the tangents of the slopes of these lookups. Then a sample's matrix is

.. math:: w = \sum_t \dot l_t r_t^\top + l_t \dot r_t^\top + \sum_s e_{y_s} u_s^\top.

Its products with all :math:`r_t`, with all :math:`l_t` from the left, and its rows :math:`y_s` are
computed from the inner products of rows, and from their entries at :math:`y_s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from stableopt.curvature.layers.kinds import Kind, Lookup, Matrix

__all__ = ["Cotangents", "Use", "along_rows"]


class Use(NamedTuple):
    """One use of a parameter by all samples, without an autograd graph.

    The head is ``None`` for kinds without one. The tangent of a head is ``None`` if the head does not
    depend on the parameters.
    """

    kind: Kind
    head: Tensor | None
    slope: Tensor
    head_tangent: Tensor | None
    slope_tangent: Tensor


class Cotangents(NamedTuple):
    """The cotangents of one use; ``None`` for a head without a tangent."""

    head: Tensor | None
    slope: Tensor


class _Maps(NamedTuple):
    """The rows of all linear maps, ``(n * groups, T, F)``, with the uses concatenated along T."""

    left: Tensor
    right: Tensor
    left_tangent: Tensor | None
    right_tangent: Tensor | None


class _Lookups(NamedTuple):
    """Row indices ``(n, S)``, and u ``(n, S, F)``, which is zero for negative indices."""

    indices: Tensor
    tangents: Tensor

    def entries(self, rows: Tensor) -> Tensor:
        """Return the entries of ``rows`` ``(n, T, V)`` at the indices, ``(n, T, S)``."""
        return rows.gather(2, self._expanded_indices(rows))

    def add_entries(self, to: Tensor, entries: Tensor) -> None:
        """Add the adjoint of :meth:`entries` in place."""
        to.scatter_add_(2, self._expanded_indices(to), entries)

    def _expanded_indices(self, rows: Tensor) -> Tensor:
        indices = self.indices.clamp(min=0).unsqueeze(1)
        return indices.expand(-1, rows.shape[1], -1)

    def masked(self, rows: Tensor) -> Tensor:
        """Return ``rows`` ``(n, S, F)`` with zeros for negative indices."""
        return rows * (self.indices >= 0).unsqueeze(2)


def along_rows(
    uses: Sequence[Use], scale: Tensor | float, shape: torch.Size, size: int
) -> list[Cotangents] | None:
    r"""Return the cotangents :math:`B_u(P w_i, a_i)` of each use, and those of the heads.

    Args:
        uses: linear maps and lookups by ``size`` samples.
        scale: P, a number or a tensor of the parameter's shape.
        shape: the parameter's shape.
        size: the number of samples.

    Returns:
        The cotangents, or ``None`` if the matrices must be formed: for other kinds of uses, for a tensor
        P with several positions, and where forming is cheaper.
    """
    maps = [use for use in uses if isinstance(use.kind, Matrix)]
    tables = [use for use in uses if isinstance(use.kind, Lookup)]
    if len(maps) + len(tables) < len(uses):
        return None
    if maps and not _worthwhile(maps, scale, size):
        return None
    if tables and any(_kind(use).head_is_left for use in maps):
        return None
    rows = _maps_of(maps, size) if maps else None
    lookups = _lookups_of(tables, size) if tables else None
    if (
        isinstance(scale, Tensor)
        and rows is not None
        and (tables or rows.left.shape[1] > 1 or len(rows.left) > size)
    ):
        return None
    cotangents: dict[int, Cotangents] = {}
    if lookups is not None:
        products = _scaled(_along_lookups(rows, lookups), _scale_at(scale, lookups))
        lengths = [use.slope[..., 0].numel() // size for use in tables]
        parts = torch.split(lookups.masked(products), lengths, dim=1)
        for use, part in zip(tables, parts, strict=True):
            cotangents[id(use)] = Cotangents(None, part.reshape(use.slope.shape))
    if rows is not None:
        if isinstance(scale, Tensor):
            left, right = _along_scaled_maps(rows, scale.reshape(len(scale), -1))
        else:
            left, right = (_scaled(part, scale) for part in _along_maps(rows, lookups))
        lengths = [_positions(use, size) for use in maps]
        for use, *pair in zip(maps, _parts(left, lengths), _parts(right, lengths), strict=True):
            cotangents[id(use)] = _as_cotangents(use, *pair)
    return [cotangents[id(use)] for use in uses]


def _kind(use: Use) -> Matrix:
    assert isinstance(use.kind, Matrix)
    return use.kind


def _positions(use: Use, size: int) -> int:
    """Return the number of positions in a sample."""
    return _kind(use).positions(use.head, use.slope, size)


def _worthwhile(maps: Sequence[Use], scale: Tensor | float, size: int) -> bool:
    """Return whether Gram matrices of the positions cost less than one matrix for each sample."""
    positions = sum(_positions(use, size) for use in maps)
    if positions == 1:
        return True
    outputs, inputs = _kind(maps[0]).sizes(maps[0].head, maps[0].slope)
    return outputs * inputs > positions * (outputs + inputs)


def _maps_of(maps: Sequence[Use], size: int) -> _Maps:
    """Return the rows of all uses, joined."""
    lefts, rights, left_tangents, right_tangents = [], [], [], []
    for use in maps:
        kind = _kind(use)
        _, head, slope, head_tangent, slope_tangent = use
        assert head is not None
        head_rows = kind.head_rows(head, size)
        head_tangent_rows = None if head_tangent is None else kind.head_rows(head_tangent, size)
        of_head = head_rows, head_tangent_rows
        of_slope = kind.slope_rows(slope, size), kind.slope_rows(slope_tangent, size)
        (left, left_tangent), (right, right_tangent) = (
            (of_head, of_slope) if kind.head_is_left else (of_slope, of_head)
        )
        lefts.append(left)
        rights.append(right)
        left_tangents.append(left_tangent)
        right_tangents.append(right_tangent)
    return _Maps(
        _cat(lefts), _cat(rights), _filled(left_tangents, lefts), _filled(right_tangents, rights)
    )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _filled(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """Return the tangents joined, with zeros for missing ones, or ``None`` if all are missing."""
    if all(tangent is None for tangent in tangents):
        return None
    pairs = zip(tangents, like, strict=True)
    return _cat([torch.zeros_like(rows) if t is None else t for t, rows in pairs])


def _lookups_of(tables: Sequence[Use], size: int) -> _Lookups:
    indices, tangents = [], []
    for use in tables:
        assert use.head is not None
        indices.append(use.head.reshape(size, -1))
        tangents.append(use.slope_tangent.reshape(size, -1, use.slope.shape[-1]))
    lookups = _Lookups(_cat(indices), _cat(tangents))
    return lookups._replace(tangents=lookups.masked(lookups.tangents))


def _along_lookups(maps: _Maps | None, lookups: _Lookups) -> Tensor:
    """Return the rows of w at the lookups' indices, ``(n, S, F)``."""
    indices = lookups.indices
    equal = (indices.unsqueeze(1) == indices.unsqueeze(2)).to(lookups.tangents.dtype)
    rows = equal @ lookups.tangents
    if maps is not None:
        left, right, left_tangent, right_tangent = maps
        if left_tangent is not None:
            rows = rows + lookups.entries(left_tangent).mT @ right
        if right_tangent is not None:
            rows = rows + lookups.entries(left).mT @ right_tangent
    return rows


_Pair = tuple[Tensor | None, Tensor | None]
"""Cotangents of left and right rows; ``None`` for rows without tangents."""


def _along_maps(maps: _Maps, lookups: _Lookups | None) -> _Pair:
    """Return the products of w with all right rows, and of all left rows with w."""
    left, right, left_tangent, right_tangent = maps
    along_left = along_right = None
    if left_tangent is not None:
        along_left = _terms((right, right, left_tangent), (right, right_tangent, left))
        if lookups is not None:
            lookups.add_entries(along_left, right @ lookups.tangents.mT)
    if right_tangent is not None:
        along_right = _terms((left, left_tangent, right), (left, left, right_tangent))
        if lookups is not None:
            along_right = along_right + lookups.entries(left) @ lookups.tangents
    return along_left, along_right


def _terms(*terms: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
    r"""Return the sum of :math:`(ab^\top)c` over the terms without a ``None``."""
    total: Tensor | None = None
    for a, b, c in terms:
        if b is None or c is None:
            continue
        single = a.shape[1] == 1  # with one position the inner product is a number
        term = torch.linalg.vecdot(a, b).unsqueeze(2) * c if single else (a @ b.mT) @ c
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def _along_scaled_maps(maps: _Maps, scale: Tensor) -> _Pair:
    """Return the same products of P w, for a tensor P ``(left, right)`` and one position."""
    left, right, left_tangent, right_tangent = maps
    along_left = along_right = None
    if left_tangent is not None:
        along_left = left_tangent * ((right * right) @ scale.T)
        if right_tangent is not None:
            along_left = along_left + left * ((right_tangent * right) @ scale.T)
    if right_tangent is not None:
        along_right = right_tangent * ((left * left) @ scale)
        if left_tangent is not None:
            along_right = along_right + right * ((left_tangent * left) @ scale)
    return along_left, along_right


def _as_cotangents(use: Use, left: Tensor | None, right: Tensor | None) -> Cotangents:
    kind = _kind(use)
    of_head, of_slope = (left, right) if kind.head_is_left else (right, left)
    assert of_slope is not None
    along_head = None
    if use.head_tangent is not None:
        assert of_head is not None
        along_head = kind.head_of(of_head, use.head_tangent)
    return Cotangents(along_head, kind.slope_of(of_slope, use.slope))


def _parts(rows: Tensor | None, lengths: Sequence[int]) -> Sequence[Tensor | None]:
    if rows is None or len(lengths) == 1:
        return [rows] * len(lengths)
    return torch.split(rows, list(lengths), dim=1)


def _scale_at(scale: Tensor | float, lookups: _Lookups) -> Tensor | float:
    return scale[lookups.indices.clamp(min=0)] if isinstance(scale, Tensor) else scale


@overload
def _scaled(tensor: Tensor, scale: Tensor | float) -> Tensor: ...
@overload
def _scaled(tensor: Tensor | None, scale: Tensor | float) -> Tensor | None: ...
def _scaled(tensor: Tensor | None, scale: Tensor | float) -> Tensor | None:
    if tensor is None or (isinstance(scale, float) and scale == 1):
        return tensor
    return tensor * scale
