"""`Operator` and `Preconditioner`: symmetric matrices that are known by their products alone."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Operator", "Preconditioner"]


class Operator(abc.ABC):
    """A real symmetric matrix of shape ``(d, d)`` known by its products alone.

    ``operator @ v`` takes ``(d,)`` or ``(d, k)`` of the operator's dtype and device, and raises
    ``ValueError`` for anything else. A subclass defines :meth:`product`.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector: what ``@`` does with the columns of a block.

        A subclass overrides it where several products cost less than one after the other.
        """
        return [self.product(vector) for vector in vectors]

    def agreed(self, numbers: Tensor) -> Tensor:
        """Return the ``numbers`` by which a search with this operator decides.

        They are what this process found, unless a product takes several: then all go by the same.
        """
        return numbers

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
    """A symmetric positive definite matrix ``(d, d)`` known by its products."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
