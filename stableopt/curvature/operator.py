"""`Operator` and `Preconditioner`: symmetric matrices known only by their products."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Operator", "Preconditioner"]


class Operator(abc.ABC):
    """A real symmetric matrix of shape ``(d, d)`` known only by its products.

    ``operator @ v`` takes ``(d,)`` or ``(d, k)`` of the operator's dtype and device, and raises
    ``ValueError`` for anything else. A subclass defines :meth:`product`. Where several processes
    compute a product, or hold shards of the vectors, its attribute ``inner_product``
    (:class:`~stableopt.curvature.eigen.inner_product.InnerProduct`) says so to eigen-solvers.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector; ``@`` calls it with the columns of a block.

        A subclass overrides it where several products together cost less.
        """
        return [self.product(vector) for vector in vectors]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.shape[1]:
            raise ValueError(
                f"{type(self).__name__} of shape {self.shape} @ {tuple(vectors.shape)}:"
                f" expected ({self.shape[1]},) or ({self.shape[1]}, k)"
            )
        if vectors.dtype != self.dtype or vectors.device != self.device:
            raise ValueError(
                f"{type(self).__name__} is {self.dtype} on {self.device}, but the vector is"
                f" {vectors.dtype} on {vectors.device}: expected the same"
            )
        # Sums begun in an ambient inference mode could not be added to inside an evaluation.
        with torch.inference_mode(False):
            if vectors.dim() == 1:
                return self.product(vectors)
            columns = self.products(vectors.unbind(1))
            return torch.stack(columns, dim=1) if columns else torch.zeros_like(vectors)


class Preconditioner(Protocol):
    """A symmetric positive definite matrix ``(d, d)`` known only by its products."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
