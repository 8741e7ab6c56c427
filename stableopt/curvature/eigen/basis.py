"""`Basis`: an orthonormal basis that grows by one row at a time, on the operator's device."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import Dual, InnerProduct

__all__ = ["Basis", "block_diagonal"]

_FIRST_ROWS = 8
"""Rows allocated at first: a search may end after a few."""

_AT_ONCE = 2**30
"""Bytes up to which a CPU allocates all rows at once: memory that is not written to takes none there,
and rows need not be copied."""

_COLUMNS = 2**13
"""Columns combined at a time, so that rows can be replaced by combinations without a copy of all."""


class Basis:
    """Covectors r and vectors q = P r, as rows, with :math:`q_i^T r_j = 1` for i = j, else 0.

    Rows are contiguous, so that a projection is one matrix product. Without a preconditioner the two
    are one tensor. Rows are allocated in blocks, up to ``most`` if given, and beyond it one by one; on a
    CPU all ``most`` at once, unless they are long.
    """

    def __init__(
        self, covectors: Tensor, vectors: Tensor, inner: InnerProduct, most: int | None = None
    ) -> None:
        self._most = most
        self.inner = inner
        self._plain = inner.preconditioner is None
        self._covectors, self._vectors = covectors, covectors if self._plain else vectors
        self.held = len(covectors)

    @property
    def covectors(self) -> Tensor:
        """The covectors ``(held, d)``."""
        return self._covectors[: self.held]

    @property
    def vectors(self) -> Tensor:
        """The vectors ``(held, d)``."""
        return self._vectors[: self.held]

    def append(self, row: Dual) -> None:
        """Add a row that is orthonormal to the others already."""
        if self.held == len(self._covectors):
            rows = self._more_rows()
            self._covectors = _grown(self._covectors, rows)
            self._vectors = self._covectors if self._plain else _grown(self._vectors, rows)
        self._covectors[self.held] = row.covector
        if not self._plain:
            self._vectors[self.held] = row.vector
        self.held += 1

    def _more_rows(self) -> int:
        rows = max(_FIRST_ROWS, self.held // 2)
        if self._most is None:
            return rows
        row, left = self._covectors[0], self._most - self.held
        if row.device.type == "cpu" and self._most * row.numel() * row.itemsize <= _AT_ONCE:
            return max(left, 1)
        return max(min(rows, left), 1)

    def split(self, image: Tensor, since: int = 0) -> tuple[Tensor, Dual]:
        """Return the coordinates of a covector in the basis, and the rest outside it, in its memory.

        There are two passes: the second removes what rounding left of the first (twice is enough:
        Parlett). The first takes only the rows from ``since`` on, for an image that has almost
        nothing of the rows before.
        """
        coordinates = self.inner.dot(self.vectors[since:], image)
        image.addmv_(self.covectors[since:].T, coordinates, alpha=-1)
        correction = self.inner.dot(self.vectors, image)
        image.addmv_(self.covectors.T, correction, alpha=-1)
        correction[since:] += coordinates
        return correction, self.inner.dual(image)

    def orthogonal(self, covector: Tensor) -> Dual:
        """Return the part of a covector outside the basis, however small, scaled to norm 1."""
        for _ in range(2):
            covector = covector - self.inner.dot(self.vectors, covector) @ self.covectors
            covector = covector / self.inner.norm(covector)
        return self.inner.dual(covector).normalised()

    def combined(self, weights: Tensor, room: int = 0) -> Basis:
        """Return the basis of the combinations ``weights`` ``(k, held)``, with room for more rows."""
        weights = weights.to(self._covectors)

        def of(rows: Tensor) -> Tensor:
            made = rows.new_empty(len(weights) + room, rows.shape[1])
            torch.mm(weights, rows, out=made[: len(weights)])
            return made

        covectors = of(self.covectors)
        vectors = covectors if self._plain else of(self.vectors)
        basis = Basis(covectors, vectors, self.inner)
        basis.held = len(weights)
        return basis

    def combine(self, weights: Tensor) -> None:
        """Replace the first n rows by combinations ``weights`` ``(k, n)``, k <= n, in place."""
        weights, (most, n) = weights.to(self._covectors), weights.shape
        held = self.held - n + most
        for rows in [self._covectors] if self._plain else [self._covectors, self._vectors]:
            for block in torch.split(rows, _COLUMNS, dim=1):
                block[:held] = torch.cat([weights @ block[:n], block[n : self.held]])
        self.held = held

    def shrunk(self) -> Basis:
        """Return it in memory of its own, where that takes less than the rows that it frees."""
        if len(self._covectors) <= 2 * self.held:
            return self
        covectors = self.covectors.clone()
        return Basis(covectors, covectors if self._plain else self.vectors.clone(), self.inner)

    def vector(self, weights: Tensor) -> Tensor:
        """Return the combination ``weights`` ``(held,)`` of the vectors ``(d,)``."""
        return weights.to(self._vectors) @ self.vectors

    def covector(self, weights: Tensor) -> Tensor | None:
        """Return the same combination of the covectors; ``None`` where they are the vectors."""
        return None if self._plain else weights.to(self._covectors) @ self.covectors

    def unit_vector(self, weights: Tensor) -> Tensor:
        """Return that combination divided by its Euclidean norm."""
        vector = self.vector(weights)
        return vector.div_(self.inner.norm(vector))


def _grown(held: Tensor, rows: int) -> Tensor:
    # Without a value in the new rows, which then take no memory of the host until they are written.
    grown = held.new_empty(len(held) + rows, held.shape[1])
    grown[: len(held)] = held
    return grown


def block_diagonal(size: int, block: Tensor) -> Tensor:
    """Return the identity of that size, and ``block`` below and right of it."""
    whole = torch.zeros(size + block.shape[0], size + block.shape[1], dtype=block.dtype)
    whole[:size, :size] = torch.eye(size, dtype=block.dtype)
    whole[size:, size:] = block
    return whole
