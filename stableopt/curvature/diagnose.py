"""Finding the module that cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.autodiff import pull
from stableopt.curvature.problem.data import map_tensors, tensors_in
from stableopt.curvature.problem.derivative_checks import WRONG, dense, flat, trusted_difference

__all__ = ["SecondDerivativeError", "differentiate_twice", "module_without_second_derivative"]


class SecondDerivativeError(RuntimeError):
    """A model has no second derivative; the message names the module and the way out."""

    def __init__(self, culprit: str | None, error: Exception) -> None:
        where = f"module {culprit}" if culprit else "the loss, or an operation between modules,"
        super().__init__(
            f"{where} cannot be differentiated twice: {str(error).splitlines()[0]}. Curvature needs"
            " it: build it from differentiable torch operations (the backward of a"
            " torch.autograd.Function must itself be differentiable, without @once_differentiable),"
            " or leave its parameters, and those of what comes before it, out by params="
        )


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
