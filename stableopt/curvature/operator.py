"""`Operator` and `Preconditioner`: symmetric matrices given by their products with vectors."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Operator", "Preconditioner"]


class Operator(abc.ABC):
    """A real symmetric matrix of shape ``(d, d)``, given by its products with vectors.

    ``operator @ v`` takes ``(d,)`` or ``(d, k)`` of the operator's dtype and device, and raises
    ``ValueError`` for anything else. A subclass defines :meth:`product`. If several processes compute a
    product together, or hold shards of the vectors, the subclass also has an attribute ``inner_product``
    (:class:`~stableopt.curvature.eigen.inner_product.InnerProduct`) for the eigen-solvers.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without an autograd graph."""

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector; ``@`` calls it with the columns of a ``(d, k)`` matrix.

        A subclass overrides it if several products are cheaper together.
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
        # Tensors created in an ambient inference mode could not be updated in place outside of it.
        with torch.inference_mode(False):
            if vectors.dim() == 1:
                return self.product(vectors)
            columns = self.products(vectors.unbind(1))
            return torch.stack(columns, dim=1) if columns else torch.zeros_like(vectors)


class Preconditioner(Protocol):
    """A symmetric positive definite matrix ``(d, d)``, given by its products with vectors."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""
