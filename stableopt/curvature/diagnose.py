"""Finding the module that cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stableopt.curvature.batches import map_tensors

__all__ = ["SecondDerivativeError", "differentiate_twice", "module_without_second_derivative"]


class SecondDerivativeError(RuntimeError):
    """A model has no second derivative; the message names the module and the way out."""

    def __init__(self, culprit: str | None, error: Exception) -> None:
        where = f"module {culprit}" if culprit else "the loss, or an operation between modules,"
        super().__init__(
            f"{where} cannot be differentiated twice: {str(error).splitlines()[0]}. Curvature needs"
            " it: build it from differentiable torch operations (the backward of a"
            " torch.autograd.Function must itself be differentiable, without @once_differentiable),"
            " or leave its parameters out and freeze what comes before it"
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
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point():
            leaves.append(tensor.requires_grad_())
        return tensor

    args, kwargs = map_tensors(leaf, args), map_tensors(leaf, kwargs)
    state = {name: leaf(p) for name, p in module.named_parameters()}
    outputs: list[Tensor] = []
    map_tensors(outputs.append, functional_call(module, state, args, kwargs))
    squares = [
        (out * out).sum() for out in outputs if out.is_floating_point() and out.requires_grad
    ]
    if not squares:
        return True
    total = torch.stack(squares).sum()
    try:
        differentiate_twice(total, leaves)
    except RuntimeError:
        return False
    return True


def differentiate_twice(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Take the second derivative of ``loss`` once, to see whether it can be.

    Raises:
        ValueError: if nothing in ``leaves`` has a gradient.
        RuntimeError: if some operation has no second derivative.
    """
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    known = [g for g in gradients if g is not None]
    if not known:
        raise ValueError("loss_fn: the loss does not depend on any of the parameters that count")
    probe = torch.stack([(g * g).sum() for g in known]).sum()
    if not probe.requires_grad:
        return
    # What @once_differentiable leaves in the graph raises only when it is reached, and a search for
    # particular leaves goes round it: their second derivative would silently lack a part.
    if _reaches(probe, "torch::autograd::Error"):
        raise RuntimeError("its backward is marked @once_differentiable")
    torch.autograd.grad(probe, leaves, allow_unused=True)


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
