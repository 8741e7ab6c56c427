"""Selection of the module to measure, without its wrappers, and of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stableopt._support.arguments import shown
from stableopt.curvature.isolation.precision import Precision

__all__ = [
    "check_batch_norm",
    "check_embeddings",
    "group_of",
    "real_view",
    "select_parameters",
    "swapped_state",
    "unwrapped",
]


def real_view(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or the real view ``(..., 2)`` of a complex tensor, as optimizers use.

    >>> real_view(torch.tensor([1 + 2j]))
    tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def group_of(model: Any) -> Any:
    """Return the process group of a ``DistributedDataParallel`` wrapper, or ``None`` without one."""
    for layer in _wrappers(model):
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            return layer.process_group
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile`` and parallel training."""
    # A compiled module cannot be differentiated twice, and wrappers for parallel training communicate
    # in their forward pass. The module inside has the same parameters.
    *_, inner = _wrappers(model)
    return inner


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield ``model``, the module it wraps, and so on to the innermost."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        yield model
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return
        model = inner


def select_parameters(
    model: nn.Module, params: Iterable[Tensor] | None, objective: nn.Module | None = None
) -> tuple[list[str], list[nn.Parameter]]:
    """Return names and parameters: those in ``params``, or all trainable ones of ``model``.

    Args:
        model: the model.
        params: the chosen parameters; parameters of modules that the loss holds are allowed.
        objective: the module of model and loss, which names the loss's parameters.

    Raises:
        ValueError: for an empty selection, or tensors that are not parameters of ``model`` or of a
            module that the loss holds.
        TypeError: if ``params`` is not an iterable of tensors.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError("model has no trainable parameters: expected at least one")
    else:
        if isinstance(params, Tensor):
            raise TypeError("params is a single tensor: expected an iterable of parameters")
        params = list(params)
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError(
                f"params={shown(params)}: expected parameters of model, such as model.head.parameters()"
            )
        wanted = {id(p): p for p in params}
        chosen = {name: p for name, p in named.items() if id(p) in wanted}
        if objective is not None:
            in_model = {id(p) for p in named.values()}
            for name, p in objective.named_parameters():
                if id(p) in wanted and id(p) not in in_model:
                    chosen[name] = p
        unknown = set(wanted) - {id(p) for p in chosen.values()}
        if unknown:
            shapes = [tuple(wanted[key].shape) for key in unknown]
            raise ValueError(
                f"params: tensors of shapes {shapes} are not parameters of model, nor of a module that"
                " loss_fn holds"
            )
        if not chosen:
            raise ValueError("params is empty: expected at least one parameter of model")
    return list(chosen), list(chosen.values())


def swapped_state(
    module: nn.Module,
    counted: Mapping[str, tuple[Tensor, Tensor]],
    changed: Collection[str],
    precision: Precision,
) -> dict[str, Tensor]:
    """Return the state of ``module`` for a functional call.

    Args:
        module: the module.
        counted: the problem's parameters, by their names in the module, and their values; the values
            of complex parameters are real views.
        changed: names of parameters that a forward pass changes.
        precision: casts buffers and other parameters.
    """
    # Buffers as copies: some modules write to them even in eval mode.
    state = {name: precision.cast(b.clone()) for name, b in module.named_buffers()}
    if precision.casts or changed:
        for name, p in module.named_parameters():
            if precision.casts or name in changed:
                value = p.detach().clone() if name in changed else p.detach()
                state[name] = precision.cast(value)
    for name, (parameter, value) in counted.items():
        # A copy: the gradient of a complex view would need the memory layout of pairs.
        state[name] = torch.complex(*value.unbind(-1)) if parameter.is_complex() else value
    return state


def check_batch_norm(model: nn.Module) -> None:
    """Raise ``ValueError`` for batch norm without running statistics; warn of training mode."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, module in norms:
        if not module.track_running_stats:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) normalises by batch statistics even in"
                " eval mode, which couples the samples: expected track_running_stats=True, or"
                " batch_statistics=True for the sharpness of the batches' mean loss"
            )
    if any(module.training for _, module in norms):
        warnings.warn(
            "the model has batch norm in training mode: curvature is measured in eval mode, with"
            " running statistics, since batch statistics couple the samples",
            stacklevel=3,
        )


def trains_on_batch_statistics(model: nn.Module) -> bool:
    """Return whether batch norm is in training mode, or the whole model is in eval mode at present."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return any(module.training or not model.training for module in norms)


def check_embeddings(model: nn.Module, params: Iterable[Tensor]) -> None:
    """Raise ``ValueError`` for embeddings among ``params`` whose gradient is divided by frequencies."""
    counting = {id(p) for p in params}
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and module.scale_grad_by_freq
            and id(module.weight) in counting
        ):
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) has scale_grad_by_freq=True: its gradient"
                " is divided by how often an index is in the batch, so it is not the derivative of the"
                " loss, and depends on the chunks. Set it to False, or leave its weight out of params="
            )
