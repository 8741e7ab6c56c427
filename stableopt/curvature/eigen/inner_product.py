r"""`InnerProduct`: the inner product of a search, and the operations on vectors that depend on it.

With a symmetric positive definite P, :math:`PH` is symmetric in the P inner product. Each vector q is
stored with the covector r for which :math:`q = Pr`: H maps vectors to covectors, P maps covectors to
vectors, and the inner product is :math:`q^\top r' = r^\top P r'`. Neither an inverse nor a root of P is
needed. Without a preconditioner the two are one tensor. Three examples::

    InnerProduct()                                   # Euclidean
    InnerProduct(preconditioner=P)                   # r^T P r'
    InnerProduct(ranks=ranks, sharded_size=10**9)    # each rank holds a shard of every vector
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.operator import Operator, Preconditioner
from stableopt.distributed.collectives import Ranks

__all__ = ["Dual", "InnerProduct"]

_BLOCK = 16_384
"""Numbers summed at a time. Among a million in float32 a CPU's own sums were wrong by 2e-5, relative to
the lengths of the vectors; sums of sums of so many by 1e-7 for a norm and 4e-6 for a product, at the
same speed. A GPU sums in blocks by itself."""


class Dual(NamedTuple):
    r"""A covector r and its vector q = P r.

    ``norm`` is :math:`\sqrt{q^\top r}` on the device. Where P is not positive definite and the square
    is negative, it is minus the root of the square's absolute value.
    """

    covector: Tensor
    vector: Tensor
    norm: Tensor

    def normalised(self) -> Dual:
        """Return covector and vector divided by the norm."""
        covector = self.covector / self.norm
        vector = covector if self.vector is self.covector else self.vector / self.norm
        return Dual(covector, vector, self.norm)


@dataclass(frozen=True)
class InnerProduct:
    """The inner product of vectors ``(d,)``; Euclidean by default.

    Args:
        preconditioner: the matrix P of the inner product :math:`r^T P r'` of covectors.
        ranks: the ranks that compute each product together. All go by the numbers of rank 0.
        sharded_size: the size of a whole vector, where each rank holds a shard of every vector; ``None``
            where each rank holds whole vectors.

    >>> P = torch.diag(torch.tensor([1.0, 4.0]))
    >>> InnerProduct(preconditioner=P).dual(torch.tensor([0.0, 3.0])).norm
    tensor(6.)
    """

    preconditioner: Preconditioner | None = None
    ranks: Ranks = field(default_factory=Ranks)
    sharded_size: int | None = None

    @classmethod
    def for_operator(
        cls, operator: Any, preconditioner: Preconditioner | None = None
    ) -> InnerProduct:
        """Return the ``inner_product`` of an operator, Euclidean if it has none, with P."""
        inner = getattr(operator, "inner_product", None)  # `operator` is anything with `@`
        return replace(inner or cls(), preconditioner=preconditioner)

    def whole_size(self, own: int) -> int:
        """Return the size of a whole vector if this rank holds ``own`` numbers."""
        return own if self.sharded_size is None else self.sharded_size

    def dot(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Return ``rows @ vector`` for ``(d,)`` or ``(k, d)``, accurate in float32 for a large d."""
        own = _own_dot(rows, vector)
        return own if self.sharded_size is None else self.ranks.all_reduce_sum(own)

    def norm(self, vector: Tensor) -> Tensor:
        """Return the Euclidean norm of ``vector`` ``(d,)``; it does not depend on P."""
        return vector.norm() if self.sharded_size is None else self.dot(vector, vector).sqrt()

    def dual(self, covector: Tensor) -> Dual:
        """Return ``covector`` ``(d,)`` with its vector and norm."""
        if self.preconditioner is None:
            return Dual(covector, covector, self.dot(covector, covector).sqrt())
        vector = self.preconditioner @ covector
        square = self.dot(covector, vector)
        # Where rounding is all that is left of a covector, it decides the sign of the square too.
        rounding = 10 * torch.finfo(covector.dtype).eps * covector.norm() * vector.norm()
        norm = square.abs().sqrt() * torch.where(square >= -rounding, 1.0, -1.0)
        return Dual(covector, vector, norm)

    def add(self, one: Dual, weight: float, other: Dual) -> Dual:
        """Return ``one + weight * other``, without a product with P."""
        covector = one.covector + weight * other.covector
        vector = covector
        if self.preconditioner is not None:
            vector = one.vector + weight * other.vector
        return Dual(covector, vector, self.dot(covector, vector).sqrt())

    def noise(self, like: Operator | Tensor, seed: int, draw: int = 0) -> Dual:
        """Return a random direction of norm 1: its covector is normal, of size and dtype as ``like``.

        Each ``draw`` with one seed is another. Of a sharded vector each rank draws its own shard.
        """
        generator = self._generator(like, seed, draw)
        drawn = torch.randn(
            like.shape[0], generator=generator, dtype=like.dtype, device=like.device
        )
        return self.dual(drawn).normalised()

    def signs(self, like: Operator | Tensor, seed: int, draw: int = 0) -> Tensor:
        """Return a vector ``(d,)`` of random signs, 1 or -1, as :meth:`noise` is drawn."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        generator = self._generator(like, seed, draw)
        return torch.randint(2, (like.shape[0],), generator=generator, **options) * 2 - 1

    def _generator(self, like: Operator | Tensor, seed: int, draw: int) -> torch.Generator:
        rank = 0 if self.sharded_size is None else self.ranks.rank
        return torch.Generator(device=like.device).manual_seed(_mixed(seed, rank, draw))

    def magnitude(self, image: Tensor) -> Tensor:
        """Return a power of two near the largest entry: numbers divided by it can be squared."""
        largest = torch.linalg.vector_norm(
            image if len(image) else image.new_zeros(1), float("inf")
        )
        if self.sharded_size is not None:
            largest = self.ranks.all_gather(largest[None]).max()
        power = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        return torch.where((largest > 0) & torch.isfinite(largest), power, torch.ones_like(largest))

    def on_host(self, numbers: Tensor) -> Tensor:
        """Return the numbers that a search decides by, in float64: one host transfer.

        They are rank 0's on every rank, since rounding may differ and decisions must not.
        """
        return self.ranks.broadcast(numbers).cpu().double()

    def check_product(self, numbers: Tensor, norm: float, product: int, operator: Any) -> None:
        """Raise unless the coordinates of a product are finite, and ``norm``, of its rest, is one.

        Raises:
            NonFiniteError: if a coordinate is not finite.
            ValueError: as :meth:`check_norm`.
        """
        if not bool(torch.isfinite(numbers).all()):
            raise NonFiniteError(f"product {product} with {type(operator).__name__} is not finite")
        self.check_norm(norm)

    def check_norm(self, norm: float) -> None:
        """Raise ``ValueError`` for a norm that no positive definite P gives a finite covector."""
        if self.preconditioner is not None and not 0 <= norm < float("inf"):
            square = norm * abs(norm)
            raise ValueError(
                f"preconditioner={type(self.preconditioner).__name__}: r^T P r is {square:.3g} for a"
                " covector r, expected a positive number, as of a symmetric positive definite matrix"
            )


def _mixed(seed: int, rank: int, draw: int) -> int:
    """Return a seed for each combination; ``seed`` itself for the first draw of rank 0."""
    if rank == draw == 0:
        return seed
    # torch's generator on the CPU reads the lower 32 bits of a seed alone.
    mixed = hashlib.blake2b(f"{seed} {rank} {draw}".encode(), digest_size=4)
    return int.from_bytes(mixed.digest(), "big")


def _own_dot(rows: Tensor, vector: Tensor) -> Tensor:
    size = vector.shape[0]
    if size <= _BLOCK or vector.dtype == torch.float64 or vector.device.type != "cpu":
        return rows @ vector
    pairs = zip(torch.split(rows, _BLOCK, dim=-1), torch.split(vector, _BLOCK), strict=True)
    return torch.stack([part @ block for part, block in pairs]).sum(0)
