"""`Rows`: few long rows in blocks of columns that fit the cache, read once for several products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Rows", "widest"]

WIDTH = 8192
"""Columns of a block. On a CPU, products with two vectors then take the time of reading the rows once;
a plain matrix product with two columns takes more than that of reading them twice."""


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise dtype of a device.

    >>> widest(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Rows:
    """A matrix ``(capacity, d)`` with few rows, some of them in use.

    Block b holds columns ``b WIDTH`` to ``(b + 1) WIDTH`` of every row, side by side in memory. The
    remaining columns are stored separately; on a GPU these are all columns.

    Args:
        capacity: number of rows; their contents are undefined until they are written.
        like: a vector ``(d,)`` of the dtype and device.

    >>> rows = Rows(3, torch.zeros(2))
    >>> rows.write(0, torch.tensor([1.0, 2.0])); rows.write(1, torch.tensor([3.0, 4.0]), 10.0)
    >>> rows.inner(torch.ones(1, 2), count=2)
    tensor([[ 3., 70.]], dtype=torch.float64)
    >>> rows.added(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0]), beta=2.0, alpha=1.0)
    tensor([32., 43.])
    """

    def __init__(self, capacity: int, like: Tensor) -> None:
        size = len(like)
        blocks = size // WIDTH if like.device.type == "cpu" and size >= 4 * WIDTH else 0
        self.size = size
        self._split = blocks * WIDTH
        self._body = like.new_empty(blocks, capacity, WIDTH)
        self._rest = like.new_empty(capacity, size - self._split)
        self.dtype, self.device = like.dtype, like.device

    def write(self, row: int, vector: Tensor, factor: float = 1.0) -> None:
        """Set a row to ``factor * vector``."""
        head, rest = vector[: self._split], vector[self._split :]
        torch.mul(head.view(-1, WIDTH), factor, out=self._body[:, row])
        torch.mul(rest, factor, out=self._rest[row])

    def read(self, row: int) -> Tensor:
        """Return a copy of a row."""
        return torch.cat([self._body[:, row].reshape(-1), self._rest[row]])

    def inner(self, vectors: Tensor, count: int) -> Tensor:
        """Return the products ``(c, count)`` of vectors ``(c, d)`` with the first rows.

        In double precision where the device has it; sums within a block use the dtype of the rows.
        """
        exact = widest(self.device)
        products = (vectors[:, self._split :] @ self._rest[:count].T).to(exact)
        if len(self._body):
            blocks = vectors[:, : self._split].view(len(vectors), -1, WIDTH).transpose(0, 1)
            partial = torch.bmm(blocks, self._body[:, :count].transpose(1, 2))
            products += partial.sum(0, dtype=exact)
        return products

    def added(self, vector: Tensor, weights: Tensor, *, beta: float, alpha: float) -> Tensor:
        """Return ``beta * vector + alpha * sum_i weights[i] row_i``."""
        count, result = len(weights), torch.empty_like(vector)
        weights = weights.to(self.dtype)
        torch.addmv(
            vector[self._split :],
            self._rest[:count].T,
            weights,
            beta=beta,
            alpha=alpha,
            out=result[self._split :],
        )
        if len(self._body):
            torch.baddbmm(
                vector[: self._split].view(-1, 1, WIDTH),
                weights.expand(len(self._body), 1, count),
                self._body[:, :count],
                beta=beta,
                alpha=alpha,
                out=result[: self._split].view(-1, 1, WIDTH),
            )
        return result
