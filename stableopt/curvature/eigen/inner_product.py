r"""The P inner product, in which :math:`PH` is symmetric, from products with P alone.

Beside each vector q stands the covector r with :math:`q = Pr`. H takes vectors to covectors, P
covectors to vectors, and :math:`q^\top r' = r^\top P r'` is the inner product. No inverse and no root
of P is needed. Without a preconditioner the two are one tensor, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.operator import Preconditioner
from stableopt.distributed import Ranks

__all__ = [
    "Dual",
    "Pieces",
    "check_norm",
    "dot",
    "dual",
    "in_pieces",
    "magnitude_of",
    "noise",
    "normalised",
    "on_host",
    "scaled",
    "whole_size",
]

_BLOCK = 16_384
"""Numbers summed at a time. Among a million in float32 a CPU's own sums were 2e-5 wrong, relative to
the lengths of the vectors; sums of sums of so many 1e-7 for a norm and 4e-6 for a product, at the
same speed. A GPU sums in blocks by itself."""


class Dual(NamedTuple):
    r"""A covector r and its vector q = P r, or rows of them.

    ``norm`` is :math:`\sqrt{q^\top r}` on the device; below zero, minus the root of minus the square,
    where P is not positive definite.
    """

    covector: Tensor
    vector: Tensor
    norm: Tensor


class Pieces(NamedTuple):
    """Vectors of ``size`` numbers, of which each rank holds a piece."""

    ranks: Ranks
    size: int


_pieces: ContextVar[Pieces | None] = ContextVar("pieces", default=None)


@contextmanager
def in_pieces(pieces: Pieces | None) -> Iterator[None]:
    """Take vectors for pieces of longer ones: :func:`dot` then is a sum over the ranks.

    All that a search does with its vectors but add them up goes through the functions of this module,
    so that it need not know.
    """
    token = _pieces.set(pieces)
    try:
        yield
    finally:
        _pieces.reset(token)


def whole_size(own: int) -> int:
    """Return the size of the vectors of which pieces have the size ``own``.

    >>> whole_size(3)
    3
    """
    pieces = _pieces.get()
    return own if pieces is None else pieces.size


def noise(size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Return normal random numbers ``(size,)``, of each piece others."""
    pieces = _pieces.get()
    seed = seed if pieces is None else seed + (pieces.ranks.rank << 32)
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=dtype, device=device)


def normalised(vector: Tensor) -> Tensor:
    """Return ``vector`` ``(d,)`` over its Euclidean norm."""
    norm = vector.norm() if _pieces.get() is None else dot(vector, vector).sqrt()
    return vector / norm


def dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Return ``rows @ vector`` for ``(d,)`` or ``(k, d)``, accurate in float32 for a large d."""
    pieces = _pieces.get()
    own = _own_dot(rows, vector)
    return own if pieces is None else pieces.ranks.all_reduce_sum(own)


def _own_dot(rows: Tensor, vector: Tensor) -> Tensor:
    size = vector.shape[0]
    if size <= _BLOCK or vector.dtype == torch.float64 or vector.device.type != "cpu":
        return rows @ vector
    pairs = zip(torch.split(rows, _BLOCK, dim=-1), torch.split(vector, _BLOCK), strict=True)
    return torch.stack([part @ block for part, block in pairs]).sum(0)


def dual(covector: Tensor, preconditioner: Preconditioner | None) -> Dual:
    """Return ``covector`` ``(d,)`` with its vector and norm."""
    if preconditioner is None:
        return Dual(covector, covector, dot(covector, covector).sqrt())
    vector = preconditioner @ covector
    square = dot(covector, vector)
    # Where rounding is all that is left of a covector, it decides the sign of the square too.
    rounding = 10 * torch.finfo(covector.dtype).eps * covector.norm() * vector.norm()
    norm = square.abs().sqrt() * torch.where(square >= -rounding, 1.0, -1.0)
    return Dual(covector, vector, norm)


def scaled(pair: Dual) -> Dual:
    """Return the pair divided by its norm."""
    covector = pair.covector / pair.norm
    vector = covector if pair.vector is pair.covector else pair.vector / pair.norm
    return Dual(covector, vector, pair.norm)


def check_norm(norm: float, preconditioner: Preconditioner | None) -> None:
    """Raise ``ValueError`` for the norm of a finite covector that no positive definite P gives it."""
    if preconditioner is not None and not 0 <= norm < float("inf"):
        square = norm * abs(norm)
        raise ValueError(
            f"preconditioner={type(preconditioner).__name__}: r^T P r is {square:.3g} for a covector"
            " r, expected a positive number, as of a symmetric positive definite matrix"
        )


def on_host(numbers: Tensor, operator: Any) -> Tensor:
    """Return the numbers by which a search decides, in double precision: one host transfer.

    Where a product with ``operator`` takes several processes they are the same for all of these.
    """
    agreed = getattr(operator, "agreed", None)  # `operator` is anything with `@`
    return (numbers if agreed is None else agreed(numbers)).cpu().double()


def magnitude_of(image: Tensor) -> Tensor:
    """Return a power of two near the largest entry: numbers over it can be squared."""
    pieces, kept = _pieces.get(), image if len(image) else image.new_zeros(1)
    largest = torch.linalg.vector_norm(kept, float("inf"))
    if pieces is not None:
        largest = pieces.ranks.all_gather(largest[None]).max()
    power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    return torch.where((largest > 0) & torch.isfinite(largest), power, torch.ones_like(largest))
