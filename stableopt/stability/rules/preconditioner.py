r"""Preconditioners: matrices by which optimizers multiply gradients, as products with vectors.

A step :math:`\theta\leftarrow\theta-\eta P\nabla f` is gradient descent in the coordinates
:math:`y = P^{-1/2}\theta`. Its limits are therefore on :math:`\lambda_{\max}(PH)`, the preconditioned
sharpness. P is a snapshot of the optimizer's last step. Three examples::

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
    "AwaitedStep",
    "DiagonalPreconditioner",
    "MatrixPreconditioner",
    "StepPreconditioner",
    "UnknownPreconditioner",
    "UnknownStep",
    "decay_factor",
]


class StepPreconditioner(abc.ABC):
    """A symmetric positive semi-definite matrix P over given parameters: ``P @ v`` for ``(d,)``.

    Attributes:
        params: the parameters, in the order of a flat vector.
        shapes: shapes of the parameters' real views: ``(..., 2)`` for complex ones.
        diagonal: whether P is a diagonal matrix.
        by_parameter: whether P has no entries between parameters, so that each has its share of an
            eigenvector.
        shrink: the largest share :math:`1 - c` of a parameter that decoupled weight decay removes in a
            step, if the shares differ and P contains a factor :math:`2/(1 + c)` for each; else 0.
    """

    diagonal = False
    by_parameter = False
    shrink = 0.0

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = tuple(params)
        # Optimizers step on the real view of complex parameters.
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
        image = self.apply(self._unflatten(vector))
        return torch.cat([tensor.reshape(-1) for tensor in image])

    def _unflatten(self, vector: Tensor) -> list[Tensor]:
        pieces = zip(torch.split(vector, self._sizes), self.shapes, strict=True)
        return [piece.view(shape) for piece, shape in pieces]

    def over(self, params: Sequence[Tensor]) -> StepPreconditioner:
        """Return the principal submatrix of P for ``params``, in their order.

        Raises:
            ValueError: if one of them is not a parameter of P.
        """
        return _Submatrix(self, params)

    def _indices(self, params: Sequence[Tensor]) -> list[int]:
        indices = {id(p): index for index, p in enumerate(self.params)}
        for p in params:
            if id(p) not in indices:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is not one of the {len(indices)} of the"
                    " preconditioner: expected parameters of the optimizer"
                )
        return [indices[id(p)] for p in params]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.params)} parameters)"


class _Submatrix(StepPreconditioner):
    """The principal submatrix of a preconditioner for some of its parameters."""

    def __init__(self, full: StepPreconditioner, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._full, self._kept = full, full._indices(params)
        self.by_parameter = full.by_parameter

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        padded = [tensors[0].new_zeros(shape) for shape in self._full.shapes]
        for index, tensor in zip(self._kept, tensors, strict=True):
            padded[index] = tensor
        image = self._full.apply(padded)
        return [image[index] for index in self._kept]


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

    diagonal = by_parameter = True

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
        return DiagonalPreconditioner(params, [self.entries[i] for i in self._indices(params)])

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
        return self._unflatten(self.matrix @ torch.cat([tensor.reshape(-1) for tensor in tensors]))


class UnknownPreconditioner(StepPreconditioner):
    """A placeholder for an unknown P, for instance before an optimizer's first step.

    Quantities that depend on P are then not measured and have no limits.

    Args:
        reason: why P is unknown, and the remedy.
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
    """A placeholder for the P of an optimizer whose step is unknown: the rule has no limits.

    Args:
        reason: why the step is unknown, and the remedy.
    """


class AwaitedStep(UnknownStep):
    """A placeholder for the P of an optimizer whose step is known once a monitor has observed one."""


def decay_factor(shrink: float) -> float:
    """Return 2/(1 + c), by which decoupled weight decay enters the preconditioner."""
    if not shrink < 2:
        raise ValueError(
            f"decoupled weight decay multiplies the parameters by {1 - shrink} in a step: expected more"
            " than -1; lower lr or weight_decay"
        )
    return 2 / (2 - shrink)
