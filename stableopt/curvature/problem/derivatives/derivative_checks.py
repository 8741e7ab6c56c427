"""Checks that a loss has the first and second derivatives that autograd reports.

Both are compared with differences over steps so short that no kink lies inside
(:mod:`~stableopt.curvature.problem.derivatives.short_differences`), at a generic point near the given
one, and in double precision where the model can be evaluated in it. So they tell in networks with
ReLU and max-pooling as well. Where differences cannot tell, torch's own functions are trusted,
and custom ones are not.
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
    balanced,
    compare_twice,
    differentiate_twice,
    dot,
    fresh_leaves,
    norm,
    trusted_difference,
    unfrozen,
    usable_point,
)
from stableopt.curvature.problem.derivatives.short_differences import short_difference, tolerance

__all__ = [
    "Obstacle",
    "check_derivatives",
    "check_gradient",
    "check_symmetry",
    "module_without_second_derivative",
]

_LONG = 0.03
"""A step, relative to the point, that crosses kinks; smooth networks change by less than 5 % over it."""

_BENT = 0.05

_ROUNDINGS = 1000
"""Rounding errors of the loss that a difference must exceed to give a slope."""

_LEAST_LOSS = 0.01
"""A smaller loss is rounded like one of this size: a cross entropy is a difference of logits."""

_WAY_OUT = (
    "A reversed or straight-through gradient, or a part of the loss that is detached, gives a direction"
    " to go, but no curvature to measure. A backward that solves an adjoint equation must be exact, and"
    " use the parameters of its forward pass: differentiate through the solver's steps instead"
)


class Obstacle(NamedTuple):
    """Why a loss cannot be differentiated twice.

    Attributes:
        error: the reason.
        kinks: whether the gradient jumps, so that differences need short steps.
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
        evaluate: runs the model once, in double precision if there is ``double``.
        double: the same function in double precision, of parameters in double precision; ``None`` if
            the model cannot be evaluated in it.
        twice: ``False`` checks the first derivative alone, and takes no second one.

    Raises:
        ValueError: if the function does not depend on ``point``, or its gradient is not its
            derivative.
    """
    if not _depends(function, point):
        raise ValueError("loss_fn: the loss does not depend on any of the parameters that count")
    if double is None:
        judged, near = function, point
    else:
        judged, near = double, [t.detach().double() for t in point]
    near = usable_point(judged, near)
    check_gradient(judged, near)
    if not twice:
        return None
    try:
        differentiate_twice(function, point)
        compare_twice(judged, near)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        culprit = module_without_second_derivative(model, evaluate)
        check_symmetry(judged, near)
        return Obstacle(SecondDerivativeError(culprit, error), _jumps(judged, near))
    return None


def _depends(function: Function, point: Sequence[Tensor]) -> bool:
    leaves = alias_leaves(point)
    value = function(leaves)
    if not value.requires_grad:
        return False
    return any(g is not None for g in torch.autograd.grad(value, leaves, allow_unused=True))


def check_gradient(function: Function, point: Sequence[Tensor]) -> None:
    """Compare the gradient of ``function`` at ``point`` with differences of the function.

    The first direction is the gradient with every parameter's part scaled to the same norm: a gradient
    that is wrong for a few parameters is not hidden by larger ones. The second is random, and shows
    parameters whose gradient is zero by mistake. Entries that are zero within a parameter, such as the
    padding row of an embedding, count as frozen, and so do parameters without a gradient.

    Raises:
        ValueError: if differences agree with one another, but not with the gradient.
    """
    leaves = alias_leaves(point)
    value = function(leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    size, dtype = norm(leaves), leaves[0].dtype
    if size == 0:
        return
    for chosen in (balanced, unfrozen):  # one at a time: each is as large as all parameters
        direction = chosen(gradients, leaves)
        if direction is None:
            continue

        def along(distance: float, direction: Sequence[Tensor] = direction) -> float:
            return float(function(displaced(leaves, direction, distance)).detach())

        claimed = dot(gradients, direction)
        found = short_difference(
            along,
            size,
            dtype,
            scale=abs(claimed),
            noise=_ROUNDINGS
            * torch.finfo(dtype).eps
            * max(abs(float(value.detach())), _LEAST_LOSS),
            expected=claimed,
        )
        if found is None:
            continue
        largest = max(abs(claimed), abs(found.value))
        if abs(claimed - found.value) > tolerance(dtype) * largest:
            raise ValueError(
                "loss_fn: the gradient is not the derivative of the loss: along one direction it says"
                f" {claimed:.6g}, and the slope of the loss is {found.value:.6g}. {_WAY_OUT}"
            )


def check_symmetry(function: Function, point: Sequence[Tensor]) -> None:
    r"""Check that the derivative J of the gradient is symmetric, as a Hessian is.

    With u along the gradient and w along Ju, :math:`w^\top Ju = u^\top Jw`.

    Raises:
        ValueError: if it is clearly not symmetric.
    """
    leaves = fresh_leaves(point)
    first = balanced(torch.autograd.grad(function(leaves), leaves, allow_unused=True), leaves)
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
    one, other = length, float(flat(first, leaves) @ along_second.value)
    if abs(one - other) > tolerance(leaves[0].dtype) * max(one, abs(other)):
        raise ValueError(
            "loss_fn: the gradient is not the derivative of the loss: its own derivative is not"
            f" symmetric, with entries {one:.6g} and {other:.6g} across. {_WAY_OUT}"
        )


def _jumps(function: Function, point: Sequence[Tensor]) -> bool:
    """Return whether the gradient of ``function`` jumps between points near ``point``."""
    leaves = fresh_leaves(point)
    value = function(leaves)
    direction = balanced(torch.autograd.grad(value, leaves, allow_unused=True), leaves)
    # A graph that was used once can still be looked at.
    if has_kinks(value) or direction is None:
        return True
    short = trusted_difference(function, leaves, direction)
    if short is None:
        return True
    # Custom functions may have kinks that their names do not show.
    long = central_difference(gradient_along(function, leaves, direction), _LONG * norm(leaves))
    return float((long - short.value).norm()) > _BENT * float(short.value.norm())


def module_without_second_derivative(model: nn.Module, evaluate: Callable[[], Any]) -> str | None:
    """Return the innermost module of ``model`` whose double backward fails, as ``'name' (Class)``.

    ``evaluate`` runs the model once. Each module is then differentiated twice by itself, children
    before parents, at the inputs and parameters it received. ``None`` if every module can be.
    """
    calls: dict[str, _Call] = {}
    handles = []
    for name, module in model.named_modules():

        def record(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
        ) -> None:
            # Forward hooks run when a module is done, so children are recorded before parents.
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
    """A module with what it received in one evaluation."""

    module: nn.Module
    args: Any
    kwargs: Any
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _twice_differentiable(call: _Call) -> bool:
    state = call.parameters
    point: list[Tensor] = list(state.values())
    point += [t for t in tensors_in((call.args, call.kwargs)) if t.is_floating_point()]

    def squares(leaves: Sequence[Tensor]) -> Tensor:
        """Return a scalar of the module's outputs at other parameters and inputs."""
        rest = iter(leaves[len(state) :])
        given, named = map_tensors(
            lambda t: next(rest) if t.is_floating_point() else t, (call.args, call.kwargs)
        )
        at = {**call.buffers, **dict(zip(state, leaves, strict=False))}
        called = functional_call(call.module, at, given, named)
        sums = [(out * out).sum() for out in tensors_in(called) if out.is_floating_point()]
        return torch.stack(sums).sum() if sums else torch.zeros(())

    try:
        differentiate_twice(squares, point)
        if point and _depends(squares, point):
            compare_twice(squares, usable_point(squares, point))
    except UnverifiedError:
        return True
    except RuntimeError:
        return False
    return True
