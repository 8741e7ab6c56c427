"""Errors of curvature products and eigen-solvers."""

from __future__ import annotations

__all__ = ["DifferenceError", "NonFiniteError", "SecondDerivativeError", "UnfitError"]


class DifferenceError(RuntimeError):
    """Central differences over two steps disagree: the gradient jumps, or is mostly noise."""


class NonFiniteError(ArithmeticError):
    """A product with the operator was not finite."""


class UnfitError(Exception):
    """The structured method does not apply: the model does not use its layers in a known way."""


class SecondDerivativeError(RuntimeError):
    """A model has no second derivative; the message names the module and the remedy."""

    def __init__(self, culprit: str | None, error: Exception) -> None:
        where = f"module {culprit}" if culprit else "the loss, or an operation between modules,"
        super().__init__(
            f"{where} cannot be differentiated twice: {str(error).splitlines()[0]}. Curvature needs"
            " it: build it from differentiable torch operations (the backward of a"
            " torch.autograd.Function must itself be differentiable, without @once_differentiable),"
            " or leave its parameters, and those of what comes before it, out by params="
        )
