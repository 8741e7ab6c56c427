"""`differentiate_twice`, `compare_twice`: whether second derivatives exist, and are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from stableopt.curvature.problem.derivatives.sketch import sketch

__all__ = [
    "UnverifiedError",
    "alias_leaves",
    "as_one",
    "balanced",
    "compare_twice",
    "differentiate_twice",
    "dot",
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


_WHOLE = 2**22
"""Numbers up to which gradients are compared whole, and beyond as sketches:
copies of all parameters would take more memory than a training step."""


def fresh_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of ``point`` that require gradients."""
    return [t.detach().clone().requires_grad_() for t in point]


def alias_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves that require gradients, in the memory of ``point``."""
    return [t.detach().requires_grad_() for t in point]


def usable_point(function: Function, point: Sequence[Tensor]) -> list[Tensor]:
    """Return a generic point near ``point``, or ``point`` if the function is not finite there."""
    near = generic_point(point)
    return near if bool(torch.isfinite(function(near))) else fresh_leaves(point)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm of all ``tensors`` together."""
    return _norm(tensors)


def _norm(tensors: Sequence[Tensor | None]) -> float:
    parts = [dense(t.detach()).norm() for t in tensors if t is not None]
    return float(torch.stack(parts).norm()) if parts else 0.0


def dot(ones: Sequence[Tensor | None], others: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors; ``None`` counts as zero."""
    pairs = zip(ones, others, strict=True)
    parts = [(dense(one.detach()) * other).sum() for one, other in pairs if one is not None]
    return float(torch.stack(parts).sum()) if parts else 0.0


def as_one(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the concatenation of ``tensors``, or for many numbers a sketch of it: a linear map.

    >>> whole = torch.randn(5_000_000)
    >>> len(as_one([whole], [whole]))
    1024
    """
    if sum(t.numel() for t in like) <= _WHOLE:
        return flat(tensors, like)
    return sketch((dense(t.detach()) for t in tensors if t is not None), like[0].device)


def balanced(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the unit direction with equal parts along each gradient that is not zero."""
    if not 0 < _norm(gradients) < float("inf"):
        return None
    parts = []
    for gradient, t in zip(gradients, like, strict=True):
        part = torch.zeros_like(t) if gradient is None else dense(gradient.detach()).to(t)
        size = part.norm()
        parts.append(part / size.where(size > 0, 1))  # without a host transfer for each
    length = norm(parts)
    return [part.div_(length) for part in parts]


def unfrozen(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor] | None:
    """Return a random unit direction in which frozen entries stay."""
    parts = _random(like)
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is None:
            part.zero_()
            continue
        moves = dense(gradient.detach()) != 0
        part.mul_(moves.logical_or_(~moves.any()))
    length = norm(parts)
    return [part.div_(length) for part in parts] if length > 0 else None


def trusted_difference(
    function: Function,
    leaves: Sequence[Tensor],
    direction: Sequence[Tensor],
    summary: Callable[[Sequence[Tensor | None], Sequence[Tensor]], Tensor] = flat,
    *,
    slope: float | None = None,
    expected: Tensor | None = None,
) -> Difference[Tensor] | None:
    """Return the gradient's derivative along a unit direction, ``None`` if no two steps agree.

    ``summary`` makes a vector of the gradient's parts. If they are known, ``slope`` is the gradient's
    norm at the leaves, and ``expected`` the summary of its derivative.
    """
    gradient, size = gradient_along(function, leaves, direction, summary), norm(leaves)
    dtype = leaves[0].dtype
    slope = float(gradient(0.0).norm()) if slope is None else slope
    least = max(slope, _LEAST_LOSS / size if size > 0 else 0.0)
    noise = _ROUNDINGS * torch.finfo(dtype).eps * least
    return short_difference(gradient, size, dtype, noise=noise, expected=expected)


def differentiate_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Take second derivatives of ``function`` at ``point``, to find out whether they exist.

    Raises:
        RuntimeError: if some operation has no second derivative, or one that is not finite.
    """
    leaves = alias_leaves(point)
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
    product = vjp(gradients, leaves, direction)
    finite = [torch.isfinite(dense(part)).all() for part in product if part is not None]
    if finite and not bool(torch.stack(finite).all()):
        raise RuntimeError("its second derivative is not finite, though the first is")


def compare_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Compare second derivatives of ``function`` with differences of the first.

    Raises:
        RuntimeError: if they differ, as for torch's own weight norm in torch 2.13, or if differences
            cannot tell and the function is not made of torch's operations alone.
    """
    hooks: list[bool] = []
    leaves = alias_leaves(point)
    with HooksSeen(lambda: hooks.append(True)):
        value = function(leaves)
    if not value.requires_grad:
        return
    custom = bool(hooks) or has_custom_function(value)
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    compared, slope = False, _norm(gradients)
    for chosen in (balanced, unfrozen):  # one at a time: each is as large as all parameters
        direction = chosen(gradients, leaves)
        if direction is None:
            continue
        product = as_one(vjp(gradients, leaves, direction), leaves)
        bent = trusted_difference(
            function, leaves, direction, as_one, slope=slope, expected=product
        )
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
    moved = [t.detach() for t in generic_point(like)]
    for part, t in zip(moved, like, strict=True):
        part.sub_(t.detach())
    length = norm(moved)
    return [part.div_(length) for part in moved] if length > 0 else moved
