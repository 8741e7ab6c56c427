"""Checks that a loss has the first and second derivatives that autograd reports.

Both are compared with central differences at a generic point near the given point, in double precision
if the model can be evaluated in it. The steps are so short that no kink lies inside
(:mod:`~stableopt.curvature.problem.derivatives.short_differences`), so the checks also work for networks
with ReLU and max-pooling. If no difference is reliable, torch's own functions are trusted, and custom
functions are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.autodiff import (
    Function,
    central_difference,
    displaced,
    flat,
    gradient_along,
)
from stableopt.curvature.errors import SecondDerivativeError
from stableopt.curvature.problem.data.batches import map_tensors, tensors_in
from stableopt.curvature.problem.derivatives.graphs import has_kinks
from stableopt.curvature.problem.derivatives.second_derivative import (
    UnverifiedError,
    alias_leaves,
    balanced_direction,
    compare_twice,
    differentiate_twice,
    dot,
    fresh_leaves,
    norm,
    random_direction,
    trusted_difference,
    usable_point,
)
from stableopt.curvature.problem.derivatives.short_differences import (
    LEAST_LOSS,
    short_difference,
    tolerance,
)

__all__ = [
    "Obstacle",
    "check_derivatives",
    "check_gradient",
    "check_symmetry",
    "module_without_second_derivative",
]

_LONG = 0.03
"""A step, relative to the norm of the point, that crosses kinks."""

_BENT = 0.05
"""Relative change of a slope over that step above which the gradient jumps."""

_ROUNDINGS = 1000
"""Rounding errors of the loss that a difference must exceed to give a slope."""

_REMEDY = (
    "A reversed or straight-through gradient, or a detached part of the loss, gives a direction for the"
    " optimizer, but has no curvature: put values that training holds fixed, such as the old"
    " log-probabilities of a policy loss, into the batch. A backward that solves an adjoint equation"
    " must be exact, and use the parameters of its forward pass: differentiate through the solver's"
    " steps instead"
)


class Obstacle(NamedTuple):
    """Why a loss cannot be differentiated twice.

    Attributes:
        error: the reason.
        kinks: whether the gradient jumps; differences then need short steps.
    """

    error: SecondDerivativeError
    kinks: bool


def check_derivatives(
    function: Function,
    point: Sequence[Tensor],
    model: nn.Module,
    evaluate: Callable[[], Any],
    double: Function | None = None,
    *,
    twice: bool = True,
) -> Obstacle | None:
    """Return why ``function`` cannot be differentiated twice at ``point``, or ``None`` if it can.

    Args:
        function: the loss as a function of the parameters.
        point: the parameters.
        model: searched for the module without a second derivative.
        evaluate: runs the model once, in double precision if ``double`` is given.
        double: the same function of parameters in double precision; ``None`` if the model cannot be
            evaluated in it.
        twice: whether to check second derivatives too.

    Raises:
        ValueError: if the function does not depend on ``point``, or its gradient is not its
            derivative.
    """
    if not _depends_on(function, point):
        raise ValueError("loss_fn: the loss does not depend on any of the parameters (params=)")
    if double is None:
        compared, near = function, point
    else:
        compared, near = double, [t.detach().double() for t in point]
    near = usable_point(compared, near)
    check_gradient(compared, near)
    if not twice:
        return None
    try:
        differentiate_twice(function, point)
        compare_twice(compared, near)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        culprit = module_without_second_derivative(model, evaluate)
        check_symmetry(compared, near)
        return Obstacle(SecondDerivativeError(culprit, error), _jumps(compared, near))
    return None


def _depends_on(function: Function, point: Sequence[Tensor]) -> bool:
    leaves = alias_leaves(point)
    value = function(leaves)
    if not value.requires_grad:
        return False
    return any(g is not None for g in torch.autograd.grad(value, leaves, allow_unused=True))


def check_gradient(function: Function, point: Sequence[Tensor]) -> None:
    """Compare the gradient of ``function`` at ``point`` with differences of the function.

    The first direction is the gradient with each parameter's part scaled to the same norm, so that large
    gradients do not hide a small wrong one. The second direction is random, and finds parameters whose
    gradient is zero by mistake. Zero entries of a parameter's gradient, such as the padding row of an
    embedding, count as frozen, and so do parameters without a gradient.

    Raises:
        ValueError: if differences agree with each other, but not with the gradient.
    """
    leaves = alias_leaves(point)
    value = function(leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    size, dtype = norm(leaves), leaves[0].dtype
    if size == 0:
        return
    loss_size = max(abs(float(value.detach())), LEAST_LOSS)
    noise = _ROUNDINGS * torch.finfo(dtype).eps * loss_size
    # One direction at a time: each is as large as all parameters.
    for choose_direction in (balanced_direction, random_direction):
        direction = choose_direction(gradients, leaves)
        if direction is None:
            continue

        def along(distance: float, direction: Sequence[Tensor] = direction) -> float:
            return float(function(displaced(leaves, direction, distance)).detach())

        claimed = dot(gradients, direction)
        slope = short_difference(
            along, size, dtype, scale=abs(claimed), noise=noise, expected=claimed
        )
        if slope is None:
            continue
        largest = max(abs(claimed), abs(slope.value))
        if abs(claimed - slope.value) > tolerance(dtype) * largest:
            raise ValueError(
                "loss_fn: the gradient is not the derivative of the loss: along one direction the"
                f" gradient gives {claimed:.6g}, and the loss has slope {slope.value:.6g}. {_REMEDY}"
            )


def check_symmetry(function: Function, point: Sequence[Tensor]) -> None:
    r"""Check that the derivative J of the gradient is symmetric, as a Hessian must be.

    With unit vectors u along the gradient and w along Ju, the check is :math:`w^\top Ju = u^\top Jw`.

    Raises:
        ValueError: if it is clearly not symmetric.
    """
    leaves = fresh_leaves(point)
    first = balanced_direction(
        torch.autograd.grad(function(leaves), leaves, allow_unused=True), leaves
    )
    if first is None:
        return
    along_first = trusted_difference(function, leaves, first)
    if along_first is None or not float(along_first.value.norm()) > 0:
        return
    parts = torch.split(along_first.value, [t.numel() for t in leaves])
    second = [part.view_as(t) for part, t in zip(parts, leaves, strict=True)]
    length = norm(second)
    second = [part / length for part in second]
    along_second = trusted_difference(function, leaves, second)
    if along_second is None:
        return
    entry, transposed_entry = length, float(flat(first, leaves) @ along_second.value)
    largest = max(entry, abs(transposed_entry))
    if abs(entry - transposed_entry) > tolerance(leaves[0].dtype) * largest:
        raise ValueError(
            "loss_fn: the gradient is not the derivative of the loss: the derivative of the gradient is"
            f" not symmetric, with entries {entry:.6g} and {transposed_entry:.6g} across. {_REMEDY}"
        )


def _jumps(function: Function, point: Sequence[Tensor]) -> bool:
    """Return whether the gradient of ``function`` jumps between points near ``point``."""
    leaves = fresh_leaves(point)
    value = function(leaves)
    direction = balanced_direction(torch.autograd.grad(value, leaves, allow_unused=True), leaves)
    if has_kinks(value) or direction is None:  # a freed graph still has its nodes
        return True
    short = trusted_difference(function, leaves, direction)
    if short is None:
        return True
    # The names of custom functions do not reveal kinks.
    long = central_difference(gradient_along(function, leaves, direction), _LONG * norm(leaves))
    return float((long - short.value).norm()) > _BENT * float(short.value.norm())


def module_without_second_derivative(model: nn.Module, evaluate: Callable[[], Any]) -> str | None:
    """Return the innermost module of ``model`` whose double backward fails, as ``'name' (Class)``.

    ``evaluate`` runs the model once. Each module is then differentiated twice by itself, children
    before parents, at the inputs and parameters it received. ``None`` if no module fails.
    """
    calls: dict[str, _Call] = {}
    handles = []
    for name, module in model.named_modules():

        def record(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
        ) -> None:
            # A forward hook runs after the module, so children are recorded before parents.
            if name not in calls:
                buffers = {key: b.detach().clone() for key, b in module.named_buffers()}
                calls[name] = _Call(module, args, kwargs, dict(module.named_parameters()), buffers)

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    for name, call in calls.items():
        if not _twice_differentiable(call):
            return f"{name!r} ({type(call.module).__name__})"
    return None


class _Call(NamedTuple):
    """A module with its inputs, parameters and buffers in one evaluation."""

    module: nn.Module
    args: Any
    kwargs: Any
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _twice_differentiable(call: _Call) -> bool:
    parameters = call.parameters
    point: list[Tensor] = list(parameters.values())
    point += [t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point()]

    def sum_of_squares(leaves: Sequence[Tensor]) -> Tensor:
        """Return the sum of the squared outputs at other parameters and inputs."""
        inputs = iter(leaves[len(parameters) :])
        args, kwargs = map_tensors(
            lambda t: next(inputs) if t.is_floating_point() else t, (call.args, call.kwargs)
        )
        state = {**call.buffers, **dict(zip(parameters, leaves, strict=False))}
        outputs = functional_call(call.module, state, args, kwargs)
        sums = [(out * out).sum() for out in tensors_in(outputs) if out.is_floating_point()]
        return torch.stack(sums).sum() if sums else torch.zeros((), device="cpu")

    try:
        differentiate_twice(sum_of_squares, point)
        if point and _depends_on(sum_of_squares, point):
            compare_twice(sum_of_squares, usable_point(sum_of_squares, point))
    except UnverifiedError:
        return True
    except RuntimeError:
        return False
    return True
