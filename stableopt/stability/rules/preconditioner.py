r"""Preconditioners: the matrices by which optimizers multiply gradients, as products with vectors.

A step :math:`\theta\leftarrow\theta-\eta P\nabla f` is plain gradient descent in the coordinates
:math:`y = P^{-1/2}\theta`, so its limits belong to :math:`\lambda_{\max}(PH)`, the preconditioned
sharpness. P is constant, as it was at the optimizer's last step. Three examples::

    UpdateRule.from_optimizer(adam).preconditioner @ v        # read from an optimizer
    DiagonalPreconditioner(model.parameters(), scales)        # entries by parameter
    MatrixPreconditioner(model.parameters(), P)               # anything with @ on (d,)
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view

__all__ = [
    "DiagonalPreconditioner",
    "MatrixPreconditioner",
    "StepPreconditioner",
    "UnknownPreconditioner",
    "UnknownStep",
]


class StepPreconditioner(abc.ABC):
    """A symmetric positive semi-definite matrix P over given parameters: ``P @ v`` for ``(d,)``.

    Attributes:
        params: the parameters, in the order of a flat vector.
        shapes: of their parts of it; complex parameters are ``(..., 2)``.
        diagonal: whether P is a diagonal matrix.
    """

    diagonal = False

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = tuple(params)
        # A vector has the real view of a complex parameter, which optimizers step on.
        self.shapes = [real_view(p.detach()).shape for p in self.params]
        self._sizes = [shape.numel() for shape in self.shapes]

    @abc.abstractmethod
    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return P times a vector, given as one tensor for each parameter."""

    def __matmul__(self, vector: Tensor) -> Tensor:
        if vector.shape != (sum(self._sizes),):
            raise ValueError(
                f"{type(self).__name__} @ {tuple(vector.shape)}: expected ({sum(self._sizes)},)"
            )
        parts = zip(torch.split(vector, self._sizes), self.shapes, strict=True)
        image = self.apply([part.view(shape) for part, shape in parts])
        return torch.cat([t.reshape(-1) for t in image])

    def over(self, params: Sequence[Tensor]) -> StepPreconditioner:
        """Return the principal part of P for ``params``, in their order.

        Raises:
            ValueError: if one of them is not a parameter of P.
        """
        return _Part(self, params)

    def _places(self, params: Sequence[Tensor]) -> list[int]:
        known = {id(p): index for index, p in enumerate(self.params)}
        for p in params:
            if id(p) not in known:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is not one of the {len(known)} of the"
                    " preconditioner: expected those of the optimizer"
                )
        return [known[id(p)] for p in params]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.params)} parameters)"


class _Part(StepPreconditioner):
    """The principal part of a preconditioner among some of its parameters."""

    def __init__(self, whole: StepPreconditioner, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._whole, self._at = whole, whole._places(params)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        like = tensors[0]
        full = [like.new_zeros(shape) for shape in self._whole.shapes]
        for index, tensor in zip(self._at, tensors, strict=True):
            full[index] = tensor
        image = self._whole.apply(full)
        return [image[index] for index in self._at]


class DiagonalPreconditioner(StepPreconditioner):
    """A diagonal P.

    Args:
        params: the parameters.
        entries: for each parameter a tensor of its shape, or one number; not negative.

    Raises:
        ValueError: for entries that do not match the parameters.

    >>> P = DiagonalPreconditioner([torch.zeros(2), torch.zeros(1)], [torch.tensor([1.0, 2.0]), 0.5])
    >>> P @ torch.ones(3)
    tensor([1.0000, 2.0000, 0.5000])
    """

    diagonal = True

    def __init__(self, params: Iterable[Tensor], entries: Iterable[Tensor | float]) -> None:
        super().__init__(params)
        self.entries = tuple(entries)
        if len(self.entries) != len(self.params):
            raise ValueError(
                f"entries has {len(self.entries)} values: expected one for each of the"
                f" {len(self.params)} parameters"
            )
        for shape, entry in zip(self.shapes, self.entries, strict=True):
            if isinstance(entry, Tensor) and entry.shape != shape:
                raise ValueError(
                    f"entries: {tuple(entry.shape)} for a parameter of shape {tuple(shape)}:"
                    " expected the same, or a number"
                )

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the entries times the tensors."""
        pairs = zip(self.entries, tensors, strict=True)
        return [t * (e.to(t) if isinstance(e, Tensor) else e) for e, t in pairs]

    def over(self, params: Sequence[Tensor]) -> DiagonalPreconditioner:
        """Return the entries of ``params``."""
        return DiagonalPreconditioner(params, [self.entries[i] for i in self._places(params)])

    def roots(self) -> list[Tensor | float]:
        """Return the square roots of the entries, D in P = D D."""
        return [e.sqrt() if isinstance(e, Tensor) else e**0.5 for e in self.entries]


class MatrixPreconditioner(StepPreconditioner):
    """A symmetric positive definite matrix, given by its products with flat vectors.

    Args:
        params: the parameters, in the matrix's order.
        matrix: anything with ``@`` on ``(d,)``: a tensor, an
            :class:`~stableopt.curvature.Operator`, an L-BFGS memory.

    >>> P = MatrixPreconditioner([torch.zeros(2)], torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> P @ torch.tensor([1.0, 0.0])
    tensor([2., 1.])
    """

    def __init__(self, params: Iterable[Tensor], matrix: Any) -> None:
        super().__init__(params)
        self.matrix = matrix

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the product, split into the parameters' shapes."""
        image = self.matrix @ torch.cat([tensor.reshape(-1) for tensor in tensors])
        parts = zip(torch.split(image, self._sizes), self.shapes, strict=True)
        return [part.view(shape) for part, shape in parts]


class UnknownPreconditioner(StepPreconditioner):
    """A placeholder for a P that is not known, as before an optimizer's first step.

    Quantities that depend on it are then not measured and have no limits.

    Args:
        reason: why it is not known, and what would help.
        diagonal: whether P will be diagonal once it is known.
    """

    def __init__(self, reason: str, *, diagonal: bool = True) -> None:
        super().__init__(())
        self.reason, self.diagonal = reason, diagonal

    def apply(self, tensors: Sequence[Tensor]) -> NoReturn:
        """Raise ``ValueError``."""
        raise ValueError(f"the preconditioner is not known: {self.reason}")

    def __matmul__(self, vector: Tensor) -> NoReturn:
        self.apply([vector])

    def over(self, params: Sequence[Tensor]) -> UnknownPreconditioner:
        """Return itself."""
        return self

    def __repr__(self) -> str:
        return f"UnknownPreconditioner({self.reason!r})"


class UnknownStep(UnknownPreconditioner):
    """A placeholder for the P of an optimizer whose whole step is not known, and so no limit.

    Args:
        reason: why it is not known, and what would help.
    """
