"""Whether what autograd calls a gradient is the derivative of anything, found by differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.autodiff import dense, flat, pull
from stableopt.curvature.problem.data import map_tensors, tensors_in

__all__ = [
    "WRONG",
    "check_gradient",
    "check_symmetry",
    "differentiate_twice",
    "module_without_second_derivative",
    "trusted_difference",
]

Function = Callable[[Sequence[Tensor]], Tensor]

_SAME, WRONG = 0.01, 0.02
"""Two steps agree, and a derivative is wrong, beyond these relative differences. Smooth networks were
seen to agree to 1e-3, those with kinks only to 0.2 and worse."""

_COARSE, _FINE = 1e-3, 1e-4
"""The two steps, relative to the point. Differences of a network with kinks depend on the step, as do
those drowned by rounding: they tell nothing."""

_LADDER = (_COARSE, _FINE, 1e-5, 1e-6)
"""The steps of differences of the function itself, which rounding spares longer."""

_SEEN = 1000
"""Rounding errors of the loss that a difference of two must exceed to tell its slope to a percent."""

_WAY_OUT = (
    "A reversed or straight-through gradient, or a part of the loss that is detached, gives a direction"
    " to go, but no curvature to measure"
)


def check_gradient(function: Function, point: Sequence[Tensor]) -> bool:
    """Return whether ``function`` depends on anything in ``point``; see that its gradient is right.

    Raises:
        ValueError: if two differences of the function along the gradient agree with one another, and
            not with the gradient.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    value = function(leaves)
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    if all(g is None for g in gradients):
        return False
    norm, size = float(flat(gradients, leaves).norm()), float(flat(leaves, leaves).norm())
    if not 0 < norm < float("inf"):
        return True
    direction = _unit(gradients, leaves)
    noise = _SEEN * torch.finfo(leaves[0].dtype).eps * abs(float(value.detach()))

    def difference(step: float) -> float | None:
        sides = [
            float(function(_moved(leaves, direction, sign * step)).detach()) for sign in (1, -1)
        ]
        change = sides[0] - sides[1]
        return change / (2 * step) if abs(change) > noise else None

    # Two differences can agree by chance where the loss has kinks. Finer ones, as far down as rounding
    # lets them tell anything, must agree too before a gradient is called wrong.
    slopes = [difference(step * size) for step in _LADDER]
    told = [slope for slope in slopes if slope is not None]
    fine = told[-1] if told else 0.0
    agreed = None not in slopes[:2] and all(abs(t - fine) <= _SAME * abs(fine) for t in told)
    if agreed and all(abs(norm - t) > WRONG * abs(t) for t in told):
        raise ValueError(
            f"loss_fn: the gradient is not the derivative of the loss: its norm is {norm:.6g}, and the"
            f" slope of the loss along it {fine:.6g}. {_WAY_OUT}"
        )
    return True


def check_symmetry(function: Function, point: Sequence[Tensor]) -> None:
    r"""See that the derivative J of the gradient is symmetric, as that of any function's is.

    With u along the gradient and w along Ju, :math:`w^\top Ju = u^\top Jw`.

    Raises:
        ValueError: if it plainly is not.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    gradients = torch.autograd.grad(function(leaves), leaves, allow_unused=True)
    if not 0 < float(flat(gradients, leaves).norm()) < float("inf"):
        return
    first = _unit(gradients, leaves)
    along_first = trusted_difference(function, leaves, first)
    if along_first is None:
        return
    parts = torch.split(along_first, [t.numel() for t in leaves])
    second = _unit([part.view_as(t) for part, t in zip(parts, leaves, strict=True)], leaves)
    along_second = trusted_difference(function, leaves, second)
    if along_second is None:
        return
    one, other = float(along_first.norm()), float(flat(first, leaves) @ along_second)
    if abs(one - other) > WRONG * one:
        raise ValueError(
            "loss_fn: the gradient is not the derivative of the loss: its own derivative is not"
            f" symmetric, with entries {one:.6g} and {other:.6g} across. {_WAY_OUT}"
        )


def trusted_difference(
    function: Function, leaves: Sequence[Tensor], direction: Sequence[Tensor]
) -> Tensor | None:
    """Return the gradient's derivative along a unit direction, ``None`` where two steps disagree."""
    size = float(flat(leaves, leaves).norm())

    def difference(step: float) -> Tensor:
        sides = []
        for sign in (1, -1):
            moved = _moved(leaves, direction, sign * step)
            parts = torch.autograd.grad(function(moved), moved, allow_unused=True)
            sides.append(flat(parts, leaves))
        return (sides[0] - sides[1]) / (2 * step)

    coarse, fine = difference(_COARSE * size), difference(_FINE * size)
    return fine if bool((coarse - fine).norm() < _SAME * fine.norm()) else None


def _unit(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    norm = flat(tensors, like).norm()
    return [
        torch.zeros_like(t) if g is None else dense(g.detach()) / norm
        for g, t in zip(tensors, like, strict=True)
    ]


def _moved(leaves: Sequence[Tensor], direction: Sequence[Tensor], step: float) -> list[Tensor]:
    return [
        (t.detach() + step * d).requires_grad_() for t, d in zip(leaves, direction, strict=True)
    ]


def module_without_second_derivative(model: nn.Module, evaluate: Callable[[], Any]) -> str | None:
    """Return the innermost module of ``model`` whose double backward fails, as ``'name' (Class)``.

    ``evaluate`` runs the model once; each module is then differentiated twice by itself, children
    before parents, at the inputs it was given. ``None`` if every one of them can be.
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
    names, state = (
        zip(*module.named_parameters(), strict=True) if [*module.parameters()] else ((), ())
    )
    point: list[Tensor] = list(state)
    point += [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]

    def squares(leaves: Sequence[Tensor]) -> Tensor:
        """Return a scalar of the module's outputs at other parameters and inputs."""
        rest = iter(leaves[len(names) :])
        given, named = map_tensors(
            lambda t: next(rest) if t.is_floating_point() else t, (args, kwargs)
        )
        called = functional_call(module, dict(zip(names, leaves, strict=False)), given, named)
        sums = [(out * out).sum() for out in tensors_in(called) if out.is_floating_point()]
        return torch.stack(sums).sum() if sums else torch.zeros(())

    try:
        differentiate_twice(squares, point)
    except RuntimeError:
        return False
    return True


def differentiate_twice(
    function: Callable[[Sequence[Tensor]], Tensor], point: Sequence[Tensor]
) -> bool:
    """Take second derivatives of ``function`` at ``point``, to see whether they can be had.

    Returns whether the function depends on anything in ``point``.

    Raises:
        RuntimeError: if some operation has no second derivative, or one that is plainly wrong.
    """
    leaves = [t.detach().clone().requires_grad_() for t in point]
    value = function(leaves)
    if not value.requires_grad:
        return False
    gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    known = [g for g in gradients if g is not None]
    if not known:
        return False
    # What @once_differentiable leaves in the graph raises only when it is reached, and a search for
    # particular leaves goes round it: their second derivative would silently lack a part.
    if any(_reaches(g, "torch::autograd::Error") for g in known):
        raise RuntimeError("its backward is marked @once_differentiable")
    slope = flat(gradients, leaves)
    norm = slope.norm()
    if not bool(torch.isfinite(norm) & (norm > 0)):
        return True
    direction = [
        torch.zeros_like(t) if g is None else dense(g.detach()) / norm
        for g, t in zip(gradients, leaves, strict=True)
    ]
    product = flat(pull(gradients, leaves, direction), leaves)
    # Where differences can be trusted and the product differs, a backward is wrong, as that of
    # torch's own weight norm is in torch 2.13.
    bent = trusted_difference(function, leaves, direction)
    if bent is not None:
        error = float((product - bent).norm() / bent.norm())
        if error > WRONG:
            raise RuntimeError(
                f"its second derivative is off by {error:.0%} from differences of the first"
            )
    return True


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
