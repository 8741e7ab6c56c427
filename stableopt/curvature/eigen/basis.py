"""`Basis`: an orthonormal basis on the operator's device, extended one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import Dual, InnerProduct

__all__ = ["Basis", "block_diagonal"]

_FIRST_ROWS = 8
"""Rows allocated at first: many searches end after a few."""

_AT_ONCE = 2**30
"""Bytes up to which all rows are allocated at once on a CPU, where unwritten pages take no memory. Rows
are then never copied."""

_COLUMNS = 2**13
"""Columns combined at a time, so that a restart needs no second copy of the basis."""


class Basis:
    """Covectors r and vectors q = P r, as rows, with :math:`q_i^T r_j = 1` for i = j, else 0.

    Rows are contiguous, so that a projection is one matrix product. Without a preconditioner, covectors
    and vectors are one tensor.

    Args:
        covectors: the covectors ``(num_rows, d)``.
        vectors: the vectors ``(num_rows, d)``.
        inner: the inner product.
        capacity: the expected number of rows. Rows are allocated in blocks up to it, and one by one
            beyond it; on a CPU all at once, if they take at most 1 GiB.
    """

    def __init__(
        self, covectors: Tensor, vectors: Tensor, inner: InnerProduct, capacity: int | None = None
    ) -> None:
        self._capacity = capacity
        self.inner = inner
        self._euclidean = inner.preconditioner is None
        self._covectors, self._vectors = covectors, covectors if self._euclidean else vectors
        self.num_rows = len(covectors)

    @property
    def covectors(self) -> Tensor:
        """The covectors ``(num_rows, d)``."""
        return self._covectors[: self.num_rows]

    @property
    def vectors(self) -> Tensor:
        """The vectors ``(num_rows, d)``."""
        return self._vectors[: self.num_rows]

    def append(self, row: Dual) -> None:
        """Add a row that is orthonormal to the others already."""
        if self.num_rows == len(self._covectors):
            more = self._rows_to_allocate()
            self._covectors = _enlarged(self._covectors, more)
            self._vectors = self._covectors if self._euclidean else _enlarged(self._vectors, more)
        self._covectors[self.num_rows] = row.covector
        if not self._euclidean:
            self._vectors[self.num_rows] = row.vector
        self.num_rows += 1

    def _rows_to_allocate(self) -> int:
        block = max(_FIRST_ROWS, self.num_rows // 2)
        if self._capacity is None:
            return block
        row, remaining = self._covectors[0], self._capacity - self.num_rows
        if row.device.type == "cpu" and self._capacity * row.numel() * row.itemsize <= _AT_ONCE:
            return max(remaining, 1)
        return max(min(block, remaining), 1)

    def split(self, image: Tensor, since: int = 0) -> tuple[Tensor, Dual]:
        """Return a covector's coordinates in the basis, and its component orthogonal to the basis.

        ``image`` is overwritten. Gram–Schmidt is applied twice, since the first pass leaves rounding
        errors (twice is enough: Parlett). The first pass uses only the rows from ``since`` on: use it
        for an image that is nearly orthogonal to the rows before.
        """
        coordinates = self.inner.dot(self.vectors[since:], image)
        image.addmv_(self.covectors[since:].T, coordinates, alpha=-1)
        correction = self.inner.dot(self.vectors, image)
        image.addmv_(self.covectors.T, correction, alpha=-1)
        correction[since:] += coordinates
        return correction, self.inner.dual(image)

    def orthogonal(self, covector: Tensor) -> Dual:
        """Return a covector's component orthogonal to the basis, however small, scaled to norm 1."""
        for _ in range(2):
            covector = covector - self.inner.dot(self.vectors, covector) @ self.covectors
            covector = covector / self.inner.norm(covector)
        return self.inner.dual(covector).normalised()

    def combined(self, weights: Tensor, room: int = 0) -> Basis:
        """Return a new basis of combinations ``weights`` ``(k, num_rows)``, with ``room`` free rows."""
        weights = weights.to(self._covectors)

        def combine(rows: Tensor) -> Tensor:
            combined = rows.new_empty(len(weights) + room, rows.shape[1])
            torch.mm(weights, rows, out=combined[: len(weights)])
            return combined

        covectors = combine(self.covectors)
        vectors = covectors if self._euclidean else combine(self.vectors)
        basis = Basis(covectors, vectors, self.inner)
        basis.num_rows = len(weights)
        return basis

    def combine(self, weights: Tensor) -> None:
        """Replace the first n rows by combinations ``weights`` ``(k, n)``, k <= n, in place."""
        k, n = weights.shape
        weights = weights.to(self._covectors)
        remaining = self.num_rows - n + k
        for rows in [self._covectors] if self._euclidean else [self._covectors, self._vectors]:
            for block in torch.split(rows, _COLUMNS, dim=1):
                block[:remaining] = torch.cat([weights @ block[:n], block[n : self.num_rows]])
        self.num_rows = remaining

    def shrunk(self) -> Basis:
        """Return a copy without free rows if more than half are free, else the basis itself."""
        if len(self._covectors) <= 2 * self.num_rows:
            return self
        covectors = self.covectors.clone()
        return Basis(covectors, covectors if self._euclidean else self.vectors.clone(), self.inner)

    def vector(self, weights: Tensor) -> Tensor:
        """Return the combination of the vectors with ``weights`` ``(num_rows,)``."""
        return weights.to(self._vectors) @ self.vectors

    def covector(self, weights: Tensor) -> Tensor | None:
        """Return that combination of the covectors; ``None`` without a preconditioner."""
        return None if self._euclidean else weights.to(self._covectors) @ self.covectors

    def unit_vector(self, weights: Tensor) -> Tensor:
        """Return that combination of the vectors, divided by its Euclidean norm."""
        vector = self.vector(weights)
        return vector.div_(self.inner.norm(vector))


def _enlarged(rows: Tensor, more: int) -> Tensor:
    # Uninitialised rows take no host memory until they are written.
    enlarged = rows.new_empty(len(rows) + more, rows.shape[1])
    enlarged[: len(rows)] = rows
    return enlarged


def block_diagonal(size: int, block: Tensor) -> Tensor:
    """Return the block diagonal matrix of the identity of ``size`` and ``block``."""
    matrix = block.new_zeros(size + block.shape[0], size + block.shape[1])
    matrix[:size, :size].fill_diagonal_(1.0)
    matrix[size:, size:] = block
    return matrix
