"""`differentiate_twice`, `compare_twice`: whether second derivatives exist, and are correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stableopt.curvature.autodiff import Function, dense, flat, gradient_along, vjp
from stableopt.curvature.problem.derivatives.graphs import (
    HookWatcher,
    has_custom_function,
    lacks_derivative,
)
from stableopt.curvature.problem.derivatives.short_differences import (
    LEAST_LOSS,
    Difference,
    generic_point,
    short_difference,
    tolerance,
)
from stableopt.curvature.problem.derivatives.sketch import sketch

__all__ = [
    "UnverifiedError",
    "alias_leaves",
    "balanced_direction",
    "compare_twice",
    "differentiate_twice",
    "dot",
    "flat_or_sketch",
    "fresh_leaves",
    "norm",
    "random_direction",
    "trusted_difference",
    "usable_point",
]

_ROUNDINGS = 10
"""Rounding errors of a gradient that a difference must exceed to give a slope."""

_WHOLE = 2**22
"""Length up to which gradients are compared entry by entry. Of longer ones sketches are compared, since
copies of all parameters would take more memory than a training step."""


class UnverifiedError(RuntimeError):
    """A custom second derivative that differences neither confirm nor refute."""


def fresh_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of ``point`` that require gradients."""
    return [t.detach().clone().requires_grad_() for t in point]


def alias_leaves(point: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves that require gradients and share the memory of ``point``."""
    return [t.detach().requires_grad_() for t in point]


def usable_point(function: Function, point: Sequence[Tensor]) -> list[Tensor]:
    """Return a generic point near ``point``, or ``point`` if the function is not finite there."""
    near = generic_point(point)
    return near if bool(torch.isfinite(function(near))) else fresh_leaves(point)


def norm(tensors: Sequence[Tensor | None]) -> float:
    """Return the norm of all ``tensors`` together; ``None`` counts as zero."""
    parts = [dense(t.detach()).norm() for t in tensors if t is not None]
    return float(torch.stack(parts).norm()) if parts else 0.0


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors; ``None`` counts as zero."""
    pairs = zip(left, right, strict=True)
    parts = [(dense(a.detach()) * b).sum() for a, b in pairs if a is not None]
    return float(torch.stack(parts).sum()) if parts else 0.0


def flat_or_sketch(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Return the concatenation of ``tensors``, or a sketch of a long one. Both maps are linear.

    >>> whole = torch.randn(5_000_000)
    >>> len(flat_or_sketch([whole], [whole]))
    1024
    """
    if sum(t.numel() for t in like) <= _WHOLE:
        return flat(tensors, like)
    return sketch((dense(t.detach()) for t in tensors if t is not None), like[0].device)


def balanced_direction(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the unit vector along the gradient after scaling each parameter's part to the same norm."""
    if not 0 < norm(gradients) < float("inf"):
        return None
    parts = []
    for gradient, t in zip(gradients, like, strict=True):
        part = torch.zeros_like(t) if gradient is None else dense(gradient.detach()).to(t)
        size = part.norm()
        parts.append(part / size.where(size > 0, 1))  # no host transfer
    length = norm(parts)
    return [part.div_(length) for part in parts]


def random_direction(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return a random unit direction that is zero in frozen entries."""
    parts = _random(like)
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is None:
            part.zero_()
            continue
        trained = dense(gradient.detach()) != 0
        part.mul_(trained.logical_or_(~trained.any()))
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
    """Return the gradient's derivative along a unit direction, or ``None`` if no two steps agree.

    Args:
        function: the function.
        leaves: the point.
        direction: the direction.
        summary: makes one vector of the gradient's parts.
        slope: the norm of the gradient at the point, if known.
        expected: the summary of the derivative, if known.
    """
    gradient, size = gradient_along(function, leaves, direction, summary), norm(leaves)
    dtype = leaves[0].dtype
    slope = float(gradient(0.0).norm()) if slope is None else slope
    gradient_size = max(slope, LEAST_LOSS / size if size > 0 else 0.0)
    noise = _ROUNDINGS * torch.finfo(dtype).eps * gradient_size
    return short_difference(gradient, size, dtype, noise=noise, expected=expected)


def differentiate_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Take second derivatives of ``function`` at ``point``, to test that they exist.

    Raises:
        RuntimeError: if an operation has no second derivative, or one that is not finite.
    """
    leaves = alias_leaves(point)
    value = function(leaves)
    if not value.requires_grad:
        return
    # With a constant incoming gradient, torch does not mark a @once_differentiable function at the end
    # of the graph. A factor that requires gradients reveals it.
    factor = torch.ones_like(value, requires_grad=True)
    gradients = torch.autograd.grad(value, leaves, factor, create_graph=True, allow_unused=True)
    if lacks_derivative(*gradients):
        raise RuntimeError("its backward is marked @once_differentiable")
    direction = balanced_direction(gradients, leaves)
    if direction is None:
        return
    product = vjp(gradients, leaves, direction)
    finite = [torch.isfinite(dense(part)).all() for part in product if part is not None]
    if finite and not bool(torch.stack(finite).all()):
        raise RuntimeError("its second derivative is not finite, though the first is")


def compare_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Compare second derivatives of ``function`` with differences of its gradient.

    Raises:
        RuntimeError: if they differ, as for torch's own weight norm in torch 2.13, or if no difference
            is reliable and the function contains other operations than torch's.
    """
    hooks: list[bool] = []
    leaves = alias_leaves(point)
    with HookWatcher(lambda: hooks.append(True)):
        value = function(leaves)
    if not value.requires_grad:
        return
    custom = bool(hooks) or has_custom_function(value)
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    compared, slope = False, norm(gradients)
    # One direction at a time: each is as large as all parameters.
    for choose_direction in (balanced_direction, random_direction):
        direction = choose_direction(gradients, leaves)
        if direction is None:
            continue
        product = flat_or_sketch(vjp(gradients, leaves, direction), leaves)
        difference = trusted_difference(
            function, leaves, direction, flat_or_sketch, slope=slope, expected=product
        )
        if difference is None:
            continue
        compared = True
        largest = max(float(difference.value.norm()), float(product.norm()))
        # `not <=` instead of `>`, so that NaN counts as an error.
        if not float((product - difference.value).norm()) <= tolerance(leaves[0].dtype) * largest:
            error = float((product - difference.value).norm() / difference.value.norm())
            raise RuntimeError(
                f"its second derivative is off by {error:.0%} from differences of the first"
            )
    if custom and not compared:
        raise UnverifiedError(
            "a custom function or gradient hook determines its second derivative, and differences of"
            " the first cannot confirm it"
        )


def _random(like: Sequence[Tensor]) -> list[Tensor]:
    """Return a random unit direction whose parts have the parameters' relative sizes."""
    parts = [t.detach() for t in generic_point(like)]
    for part, t in zip(parts, like, strict=True):
        part.sub_(t.detach())
    length = norm(parts)
    return [part.div_(length) for part in parts] if length > 0 else parts
