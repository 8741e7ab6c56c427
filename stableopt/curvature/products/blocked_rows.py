"""`Rows`: a matrix of few long rows, stored in blocks of columns that fit the CPU cache."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Rows", "widest"]

WIDTH = 8192
"""Columns per block. On a CPU, products with two vectors then take the time of reading the rows once; a
plain matrix product with two columns takes longer than reading them twice."""


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise dtype of a device.

    >>> widest(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Rows:
    """A matrix ``(capacity, d)`` with few rows, some of them in use.

    Block b holds columns ``b WIDTH`` to ``(b + 1) WIDTH`` of every row, contiguous in memory. The
    remaining columns are stored separately; on a GPU, all columns are.

    Args:
        capacity: number of rows, uninitialised until they are written.
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
        self._tail_start = blocks * WIDTH
        self._blocks = like.new_empty(blocks, capacity, WIDTH)
        self._tail = like.new_empty(capacity, size - self._tail_start)
        self.dtype, self.device = like.dtype, like.device

    def write(self, row: int, vector: Tensor, factor: float = 1.0) -> None:
        """Set a row to ``factor * vector``."""
        head, tail = vector[: self._tail_start], vector[self._tail_start :]
        torch.mul(head.view(-1, WIDTH), factor, out=self._blocks[:, row])
        torch.mul(tail, factor, out=self._tail[row])

    def read(self, row: int) -> Tensor:
        """Return a copy of a row."""
        return torch.cat([self._blocks[:, row].reshape(-1), self._tail[row]])

    def inner(self, vectors: Tensor, count: int) -> Tensor:
        """Return the products ``(c, count)`` of vectors ``(c, d)`` with the first rows.

        They are in the widest dtype of the device; sums within a block use the dtype of the rows.
        """
        dtype = widest(self.device)
        products = (vectors[:, self._tail_start :] @ self._tail[:count].T).to(dtype)
        if len(self._blocks):
            blocks = vectors[:, : self._tail_start].view(len(vectors), -1, WIDTH).transpose(0, 1)
            partial = torch.bmm(blocks, self._blocks[:, :count].transpose(1, 2))
            products += partial.sum(0, dtype=dtype)
        return products

    def added(self, vector: Tensor, weights: Tensor, *, beta: float, alpha: float) -> Tensor:
        """Return ``beta * vector + alpha * sum_i weights[i] row_i``."""
        count, result = len(weights), torch.empty_like(vector)
        weights = weights.to(self.dtype)
        torch.addmv(
            vector[self._tail_start :],
            self._tail[:count].T,
            weights,
            beta=beta,
            alpha=alpha,
            out=result[self._tail_start :],
        )
        if len(self._blocks):
            torch.baddbmm(
                vector[: self._tail_start].view(-1, 1, WIDTH),
                weights.expand(len(self._blocks), 1, count),
                self._blocks[:, :count],
                beta=beta,
                alpha=alpha,
                out=result[: self._tail_start].view(-1, 1, WIDTH),
            )
        return result
