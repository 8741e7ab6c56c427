"""Modules, parameters and generators that a loss holds outside of the model, and gradient hooks.

The loss of a generator runs a discriminator, a loss may have learned weights, and a penalty may sum over
a list of parameters. Such modules are isolated like the model. Such parameters are found in the autograd
graph of the loss, and reported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.isolation.reachable import GENERATORS, HeldState, reachable
from stableopt.curvature.problem.data.layout import Layout
from stableopt.curvature.problem.derivatives.graphs import nodes_of
from stableopt.curvature.problem.parameters import real_view

__all__ = [
    "BatchLoss",
    "Held",
    "Objective",
    "check_leaves",
    "in_given_layout",
    "masks_of_hooks",
    "pair_loss",
]


class Held:
    """Objects that ``loss_fn``, and plain attributes of ``model``, hold beyond the model's own modules.

    Attributes:
        modules: the outermost of the modules that do not contain the model.
        generators: random generators.
        tensors: tensors that require gradients.

    >>> model, critic = nn.Linear(2, 1), nn.Sequential(nn.BatchNorm1d(1))
    >>> class Loss:
    ...     def __init__(self):
    ...         self.critics = [critic, model]
    >>> Held(model, Loss()).modules == [critic]
    True
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        in_model = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}
        # Two searches, so that a large model does not use up the search limit of the loss.
        reached = {id(v): v for root in (loss_fn, model) for v in reachable([root])}
        held = [v for v in reached.values() if id(v) not in in_model]
        self.generators = [v for v in held if isinstance(v, GENERATORS)]
        self.tensors = [v for v in held if isinstance(v, Tensor) and v.requires_grad]
        # Lightning holds weak proxies, which are not hashable; `modules()` yields the real one first.
        real = {id(m): m for m in (next(v.modules()) for v in held if isinstance(v, nn.Module))}
        modules = [
            m
            for m in real.values()
            if id(m) not in in_model
            and not isinstance(m, torch.jit.ScriptModule)
            and model not in set(m.modules())
        ]
        inner = {part for m in modules for part in m.modules() if part is not m}
        self.modules = [m for m in modules if m not in inner]


@dataclass(frozen=True)
class BatchLoss:
    """A function of model and batch; ``from_batch_loss`` passes it as ``loss_fn``."""

    function: Callable[[nn.Module, Any], Tensor]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of ``batch``."""
        return self.function(model, batch)


def pair_loss(
    loss_fn: Callable[[Any, Any], Tensor],
) -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss of an ``(x, y)`` batch as a function of model and batch."""
    return lambda model, batch: loss_fn(model(batch[0]), batch[1])


def in_given_layout(function: Callable[[Any], Tensor], layout: Layout) -> Callable[[Any], Tensor]:
    """Return ``function`` of batches in the user's layout as a function of the problem's batches."""
    return lambda batch: function(layout.given(batch))


class Objective(nn.Module):
    """A model and its loss as one module, so that one functional call swaps all parameters."""

    def __init__(
        self,
        model: nn.Module,
        batch_loss: Callable[[nn.Module, Any], Tensor],
        loss_fn: Any,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.model = model
        self.batch_loss = batch_loss
        if isinstance(loss_fn, nn.Module):
            # As a submodule, so that its mode and buffers are restored like the model's.
            self.loss_fn = loss_fn
        self.held = Held(model, batch_loss if loss_fn is None else loss_fn)
        # As submodules, so that they are restored and cast like the model.
        self.held_modules = nn.ModuleList(m for m in self.held.modules if m is not loss_fn)
        self.generators = self.held.generators  # as an attribute, so that a snapshot finds the list
        self.layout = layout

    def forward(self, batch: Any, leaves: Sequence[Tensor] = ()) -> Any:
        """Return the loss of ``batch``, samples first; with ``leaves`` also the gradients in them."""
        loss = self.batch_loss(self.model, self.layout.given(batch))
        if not leaves:
            return loss
        if not loss.requires_grad:
            return loss, [None] * len(leaves)
        return loss, torch.autograd.grad(loss, leaves, allow_unused=True)


def check_leaves(
    loss: Tensor, theta: Iterable[Tensor], counted: Mapping[str, Tensor], objective: nn.Module
) -> None:
    """Warn of trainable tensors in the graph of ``loss`` that a measurement treats as constants.

    Args:
        loss: the loss at ``theta``.
        theta: copies of the problem's parameters.
        counted: the problem's parameters by name.
        objective: the :class:`Objective`.

    Raises:
        ValueError: if one of the problem's parameters enters the loss other than through the model.
    """
    copies = {id(t) for t in theta}
    held = {id(t) for t in objective.held.tensors}  # type: ignore[union-attr]
    names = {id(p): name for name, p in objective.named_parameters()}
    for module in objective.held_modules:  # type: ignore[union-attr]
        kind = type(module).__name__
        names.update((id(p), f"{kind}.{name}") for name, p in module.named_parameters())
    variables = (getattr(node, "variable", None) for node in nodes_of(loss))
    leaves = [v for v in variables if isinstance(v, Tensor) and id(v) not in copies]
    leaf_ids = {id(leaf) for leaf in leaves}
    for name, p in counted.items():
        if id(p) in leaf_ids:
            raise ValueError(
                f"loss_fn: parameter {name!r} enters the loss other than through the model, for example"
                " from an earlier list, optimizer.param_groups, or a plain list in a module, and"
                " would be a constant there. Read it from the model when the loss is called, with"
                " Problem.from_batch_loss(model, lambda model, batch: ..., data), or leave the term out"
            )
    constants = []
    for leaf in leaves:
        name = names.get(id(leaf), "")
        if name.startswith("model.") or not (isinstance(leaf, nn.Parameter) or id(leaf) in held):
            continue  # left out by params=, or made in the forward pass
        constants.append(f"{name or 'a tensor'} {tuple(leaf.shape)}")
    if constants:
        constants.sort()
        warnings.warn(
            f"loss_fn: it holds trainable tensors that are not the model's: {', '.join(constants[:3])}"
            f"{', ...' if len(constants) > 3 else ''}. They count as constants. To differentiate in"
            " them, make them parameters of the model or of a module that loss_fn holds, and pass them"
            " in params=",
            stacklevel=2,
        )


def masks_of_hooks(params: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Return the masks by which hooks multiply the gradients of ``params``, or ``None`` without one.

    A mask of zeros and ones freezes entries. Hooks that change gradients in another way cause a warning.

    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.register_hook(lambda gradient: gradient * torch.tensor([[0.0, 1.0]]))
    >>> masks_of_hooks(dict(layer.named_parameters()))
    [tensor([[0., 1.]]), None]
    """
    masks: list[Tensor | None] = []
    unknown = []
    for name, p in params.items():
        hooks = list((getattr(p, "_backward_hooks", None) or {}).values())
        mask = _mask(p.detach(), hooks) if hooks else None
        if hooks and mask is None:
            unknown.append(name)
        masks.append(None if mask is None or bool((mask == 1).all()) else mask)
    if unknown:
        warnings.warn(
            f"parameters with gradient hooks: {', '.join(map(repr, unknown[:3]))}"
            f"{', ...' if len(unknown) > 3 else ''}. The optimizer steps by the gradients that the hooks"
            " return, but the measured curvature is that of the loss without hooks, since they do not"
            " multiply by a mask of zeros and ones",
            stacklevel=2,
        )
    return masks


def _mask(like: Tensor, hooks: Sequence[Callable[[Tensor], Tensor | None]]) -> Tensor | None:
    """Return the zeros and ones that ``hooks`` multiply by, or ``None`` if they do anything else."""
    if any(_from_installed_package(hook) for hook in hooks):
        return None  # it may have effects that cannot be undone

    def apply_hooks(real: Tensor) -> Tensor:
        gradient = real.clone()
        gradient = torch.view_as_complex(gradient) if like.is_complex() else gradient
        for hook in hooks:
            replacement = hook(gradient)
            gradient = gradient if replacement is None else replacement
        return real_view(gradient)

    held, rng_state = HeldState(hooks), torch.get_rng_state()
    view = real_view(like)
    generator = torch.Generator(view.device).manual_seed(0)
    try:
        with torch.no_grad():
            mask = apply_hooks(torch.ones_like(view))
            if mask.shape != view.shape or not bool(((mask == 0) | (mask == 1)).all()):
                return None
            for size in (1e-3, 1.0, 1e3):  # clipping depends on the size of the gradient
                noise = torch.randn(view.shape, generator=generator, device=view.device)
                gradient = size * noise.to(view.dtype)
                if not torch.equal(apply_hooks(gradient), mask * gradient):
                    return None
            return mask
    except Exception:  # the hook does not accept these gradients
        return None
    finally:
        held.restore()
        torch.set_rng_state(rng_state)


def _from_installed_package(hook: Any) -> bool:
    module = sys.modules.get(str(getattr(hook, "__module__", "")))
    return "site-packages" in str(getattr(module, "__file__", ""))
