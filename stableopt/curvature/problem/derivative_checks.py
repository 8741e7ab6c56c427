"""Checks that a loss has the first and second derivatives that autograd reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.autodiff import (
    Function,
    central_difference,
    dense,
    displaced,
    flat,
    gradient_along,
    vjp,
)
from stableopt.curvature.errors import SecondDerivativeError
from stableopt.curvature.problem.data import map_tensors, tensors_in

__all__ = [
    "check_derivatives",
    "check_gradient",
    "check_symmetry",
    "module_without_second_derivative",
]

_SAME, _WRONG = 0.01, 0.02
"""Relative differences below which two steps agree, and beyond which a derivative is wrong. Smooth
networks agree to 1e-3; those with kinks only to 0.2 or worse."""

_COARSE, _FINE = 1e-3, 1e-4
"""The two steps, relative to the point. Differences that depend on the step, because of kinks or
rounding, are evidence of nothing."""

_LADDER = (_COARSE, _FINE, 1e-5, 1e-6)
"""Steps for differences of the function itself, which rounding affects later."""

_ROUNDINGS = 1000
"""Rounding errors of the loss that a difference must exceed to give a slope to one percent."""

_WAY_OUT = (
    "A reversed or straight-through gradient, or a part of the loss that is detached, gives a direction"
    " to go, but no curvature to measure"
)


def check_derivatives(
    function: Function, point: Sequence[Tensor], model: nn.Module, evaluate: Callable[[], Any]
) -> SecondDerivativeError | None:
    """Return why ``function`` cannot be differentiated twice at ``point``, or ``None`` if it can.

    Args:
        function: the loss as a function of the parameters.
        point: the parameters.
        model: searched for the module without a second derivative.
        evaluate: runs the model once.

    Raises:
        ValueError: if the function does not depend on ``point``, or its gradient is not its
            derivative.
    """
    if not check_gradient(function, point):
        raise ValueError("loss_fn: the loss does not depend on any of the parameters that count")
    try:
        _differentiate_twice(function, point)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        obstacle = SecondDerivativeError(module_without_second_derivative(model, evaluate), error)
        check_symmetry(function, point)
        return obstacle
    return None


def check_gradient(function: Function, point: Sequence[Tensor]) -> bool:
    """Return whether ``function`` depends on ``point``, after comparing its gradient with differences.

    Raises:
        ValueError: if differences of the function along the gradient agree with one another, but not
            with the gradient.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    value = function(leaves)
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    if all(g is None for g in gradients):
        return False
    norm, size = float(flat(gradients, leaves).norm()), float(flat(leaves, leaves).norm())
    if not 0 < norm < float("inf") or size == 0:
        return True
    direction = _unit(gradients, leaves)
    noise = _ROUNDINGS * torch.finfo(leaves[0].dtype).eps * abs(float(value.detach()))

    def value_at(distance: float) -> float:
        return float(function(displaced(leaves, direction, distance)).detach())

    def slope_over(step: float) -> float | None:
        slope = central_difference(value_at, step)
        return slope if abs(slope) * 2 * step > noise else None

    # Two differences can agree by chance where the loss has kinks. A gradient is only called wrong if
    # finer ones agree too, down to the finest that rounding leaves meaningful.
    slopes = [slope_over(step * size) for step in _LADDER]
    known = [slope for slope in slopes if slope is not None]
    fine = known[-1] if known else 0.0
    agreed = None not in slopes[:2] and all(abs(t - fine) <= _SAME * abs(fine) for t in known)
    if agreed and all(abs(norm - t) > _WRONG * abs(t) for t in known):
        raise ValueError(
            f"loss_fn: the gradient is not the derivative of the loss: its norm is {norm:.6g}, and the"
            f" slope of the loss along it {fine:.6g}. {_WAY_OUT}"
        )
    return True


def check_symmetry(function: Function, point: Sequence[Tensor]) -> None:
    r"""Check that the derivative J of the gradient is symmetric, as a Hessian is.

    With u along the gradient and w along Ju, :math:`w^\top Ju = u^\top Jw`.

    Raises:
        ValueError: if it is clearly not symmetric.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    gradients = torch.autograd.grad(function(leaves), leaves, allow_unused=True)
    if not 0 < float(flat(gradients, leaves).norm()) < float("inf"):
        return
    first = _unit(gradients, leaves)
    along_first = _trusted_difference(function, leaves, first)
    if along_first is None:
        return
    parts = torch.split(along_first, [t.numel() for t in leaves])
    second = _unit([part.view_as(t) for part, t in zip(parts, leaves, strict=True)], leaves)
    along_second = _trusted_difference(function, leaves, second)
    if along_second is None:
        return
    one, other = float(along_first.norm()), float(flat(first, leaves) @ along_second)
    if abs(one - other) > _WRONG * one:
        raise ValueError(
            "loss_fn: the gradient is not the derivative of the loss: its own derivative is not"
            f" symmetric, with entries {one:.6g} and {other:.6g} across. {_WAY_OUT}"
        )


def _trusted_difference(
    function: Function, leaves: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor | None:
    """Return the gradient's derivative along a unit direction, ``None`` if two steps disagree."""
    size, gradient = float(flat(leaves, leaves).norm()), gradient_along(function, leaves, direction)
    coarse, fine = (central_difference(gradient, step * size) for step in (_COARSE, _FINE))
    return fine if bool((coarse - fine).norm() < _SAME * fine.norm()) else None


def _unit(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    norm = flat(tensors, like).norm()
    return [
        torch.zeros_like(t) if g is None else dense(g.detach()) / norm
        for g, t in zip(tensors, like, strict=True)
    ]


def module_without_second_derivative(model: nn.Module, evaluate: Callable[[], Any]) -> str | None:
    """Return the innermost module of ``model`` whose double backward fails, as ``'name' (Class)``.

    ``evaluate`` runs the model once. Each module is then differentiated twice by itself, children
    before parents, at the inputs it received. ``None`` if every module can be.
    """
    calls: dict[str, tuple[nn.Module, Any, Any]] = {}
    handles = []
    for name, module in model.named_modules():

        def record(
            module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name
        ) -> None:
            # Forward hooks run when a module is done, so children are recorded before parents.
            calls.setdefault(name, (module, args, kwargs))

        handles.append(module.register_forward_hook(record, with_kwargs=True))
    try:
        evaluate()
    finally:
        for handle in handles:
            handle.remove()
    for name, (module, args, kwargs) in calls.items():
        if not _twice_differentiable(module, args, kwargs):
            return f"{name!r} ({type(module).__name__})"
    return None


def _twice_differentiable(module: nn.Module, args: Any, kwargs: Any) -> bool:
    state = dict(module.named_parameters())
    point: list[Tensor] = list(state.values())
    point += [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]

    def squares(leaves: Sequence[Tensor]) -> Tensor:
        """Return a scalar of the module's outputs at other parameters and inputs."""
        rest = iter(leaves[len(state) :])
        given, named = map_tensors(
            lambda t: next(rest) if t.is_floating_point() else t, (args, kwargs)
        )
        called = functional_call(module, dict(zip(state, leaves, strict=False)), given, named)
        sums = [(out * out).sum() for out in tensors_in(called) if out.is_floating_point()]
        return torch.stack(sums).sum() if sums else torch.zeros(())

    try:
        _differentiate_twice(squares, point)
    except RuntimeError:
        return False
    return True


def _differentiate_twice(function: Function, point: Sequence[Tensor]) -> None:
    """Take second derivatives of ``function`` at ``point``, to find out whether they exist.

    Raises:
        RuntimeError: if some operation has no second derivative, or a wrong one.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    value = function(leaves)
    if not value.requires_grad:
        return
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    # What @once_differentiable leaves in the graph raises only when it is reached, and a search for
    # particular leaves avoids it: their second derivative would silently lack a part.
    if any(g is not None and _reaches(g, "torch::autograd::Error") for g in gradients):
        raise RuntimeError("its backward is marked @once_differentiable")
    norm = flat(gradients, leaves).norm()
    if not bool(torch.isfinite(norm) & (norm > 0)):
        return
    direction = _unit(gradients, leaves)
    product = flat(vjp(gradients, leaves, direction), leaves)
    # A product that differs from trustworthy differences comes from a wrong backward, such as that of
    # torch's own weight norm in torch 2.13.
    bent = _trusted_difference(function, leaves, direction)
    if bent is not None:
        error = float((product - bent).norm() / bent.norm())
        if error > _WRONG:
            raise RuntimeError(
                f"its second derivative is off by {error:.0%} from differences of the first"
            )


def _reaches(tensor: Tensor, name: str) -> bool:
    """Whether a node called ``name`` is in the graph of ``tensor``."""
    pending, seen = [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == name:
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return False
