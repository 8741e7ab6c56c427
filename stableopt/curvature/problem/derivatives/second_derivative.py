"""`differentiate_twice`, `compare_twice`: whether second derivatives exist, and are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stableopt.curvature.autodiff import Function, dense, flat, gradient_along, vjp
from stableopt.curvature.problem.derivatives.graphs import (
    HooksSeen,
    has_custom_function,
    lacks_derivative,
)
from stableopt.curvature.problem.derivatives.short_differences import (
    Difference,
    generic_point,
    short_difference,
    tolerance,
)

__all__ = [
    "UnverifiedError",
    "balanced",
    "compare_twice",
    "differentiate_twice",
    "fresh_leaves",
    "norm",
    "trusted_difference",
    "unfrozen",
    "usable_point",
]

_LEAST_LOSS = 0.01
"""A gradient is rounded at least like that of a loss of this size: where a softmax saturates, it is a
difference of probabilities near 1."""

_ROUNDINGS = 10
"""Rounding errors of a gradient that a difference must exceed to give a slope."""


class UnverifiedError(RuntimeError):
    """A custom second derivative that differences neither confirm nor refute."""


def fresh_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of ``point`` that require gradients."""
    return [t.detach().clone().requires_grad_() for t in point]


def usable_point(function: Function, point: Sequence[Tensor]) -> list[Tensor]:
    """Return a generic point near ``point``, or ``point`` if the function is not finite there."""
    near = generic_point(point)
    return near if bool(torch.isfinite(function(near))) else fresh_leaves(point)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm of all ``tensors`` together."""
    return float(flat(tensors, tensors).norm())


def balanced(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the unit direction with equal parts along each gradient that is not zero."""
    if not 0 < float(flat(gradients, like).norm()) < float("inf"):
        return None
    parts = []
    for gradient, t in zip(gradients, like, strict=True):
        part = torch.zeros_like(t) if gradient is None else dense(gradient.detach()).to(t)
        size = float(part.norm())
        parts.append(part / size if size > 0 else part)
    length = norm(parts)
    return [part / length for part in parts]


def unfrozen(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor] | None:
    """Return a random unit direction in which frozen entries stay."""
    parts = []
    for gradient, random in zip(gradients, _random(like), strict=True):
        if gradient is None:
            parts.append(torch.zeros_like(random))
            continue
        moves = dense(gradient.detach()) != 0
        parts.append(random * moves if bool(moves.any()) else random)
    length = norm(parts)
    return [part / length for part in parts] if length > 0 else None


def trusted_difference(
    function: Function, leaves: Sequence[Tensor], direction: Sequence[Tensor]
) -> Difference[Tensor] | None:
    """Return the gradient's derivative along a unit direction, ``None`` if no two steps agree."""
    gradient, size = gradient_along(function, leaves, direction), norm(leaves)
    dtype = leaves[0].dtype
    least = max(float(gradient(0.0).norm()), _LEAST_LOSS / size if size > 0 else 0.0)
    return short_difference(
        gradient, size, dtype, noise=_ROUNDINGS * torch.finfo(dtype).eps * least
    )


def differentiate_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Take second derivatives of ``function`` at ``point``, to find out whether they exist.

    Raises:
        RuntimeError: if some operation has no second derivative, or one that is not finite.
    """
    leaves = fresh_leaves(point)
    value = function(leaves)
    if not value.requires_grad:
        return
    # A gradient that a factor multiplies shows what is marked @once_differentiable at the very end:
    # there torch marks nothing if the gradient that arrives is a constant.
    factor = torch.ones_like(value, requires_grad=True)
    gradients = torch.autograd.grad(value, leaves, factor, create_graph=True, allow_unused=True)
    if lacks_derivative(*gradients):
        raise RuntimeError("its backward is marked @once_differentiable")
    direction = balanced(gradients, leaves)
    if direction is None:
        return
    product = flat(vjp(gradients, leaves, direction), leaves)
    if not bool(torch.isfinite(product).all()):
        raise RuntimeError("its second derivative is not finite, though the first is")


def compare_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Compare second derivatives of ``function`` with differences of the first.

    Raises:
        RuntimeError: if they differ, as for torch's own weight norm in torch 2.13, or if differences
            cannot tell and the function is not made of torch's operations alone.
    """
    hooks: list[bool] = []
    leaves = fresh_leaves(point)
    with HooksSeen(lambda: hooks.append(True)):
        value = function(leaves)
    if not value.requires_grad:
        return
    custom = bool(hooks) or has_custom_function(value)
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    compared = False
    for direction in (balanced(gradients, leaves), unfrozen(gradients, leaves)):
        if direction is None:
            continue
        product = flat(vjp(gradients, leaves, direction), leaves)
        bent = trusted_difference(function, leaves, direction)
        if bent is None:
            continue
        compared = True
        largest = max(float(bent.value.norm()), float(product.norm()))
        # Written so that a product that is not a number is wrong.
        if not float((product - bent.value).norm()) <= tolerance(leaves[0].dtype) * largest:
            error = float((product - bent.value).norm() / bent.value.norm())
            raise RuntimeError(
                f"its second derivative is off by {error:.0%} from differences of the first"
            )
    if custom and not compared:
        raise UnverifiedError(
            "a custom function or gradient hook determines its second derivative, and differences of"
            " the first cannot confirm it"
        )


def _random(like: Sequence[Tensor]) -> list[Tensor]:
    """Return a random unit direction, of each parameter's relative size."""
    moved = [near.detach() - t.detach() for near, t in zip(generic_point(like), like, strict=True)]
    length = norm(moved)
    return [part / length for part in moved] if length > 0 else moved
