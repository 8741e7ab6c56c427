"""`problem_of`: a model's problem; `in_rule_coordinates`: coordinates in which a step has one rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.differentiable_loss import DifferentiableLoss
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.parameters import group_of
from stableopt.curvature.problem.sharded import problem_for
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner, StepPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["check_params", "in_rule_coordinates", "outside_coordinates", "problem_of"]

P = TypeVar("P", bound=MeanLoss)


def problem_of(
    model: nn.Module | MeanLoss,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    data: Any,
    *,
    process_group: Any = None,
    **options: Any,
) -> MeanLoss:
    """Return the problem of ``model``, or ``model`` itself if it is a problem already.

    The process group is by default the one that trains the model.

    Raises:
        ValueError: if ``loss_fn`` or ``data`` is missing for a model, or any argument is given with a
            problem.
    """
    if isinstance(model, MeanLoss):
        options["process_group"] = process_group
        if any(value is not None for value in (loss_fn, data, *options.values())):
            raise ValueError(
                f"a Problem has its own loss_fn, data, {', '.join(options)}: leave them out"
            )
        return model
    if loss_fn is None or data is None:
        raise ValueError("loss_fn and data: expected both, or a Problem as model")
    group = group_of(model) if process_group is None else process_group
    given = {name: value for name, value in options.items() if value is not None}
    return problem_for(model, loss_fn, data, process_group=group, **given)


def check_params(optimizers: Sequence[torch.optim.Optimizer], problem: MeanLoss) -> None:
    """Raise ``ValueError`` unless ``optimizers`` together update exactly the parameters of ``problem``.

    If the user chose the parameters by ``params``, the optimizers may update others too.
    """
    held = {id(p) for group in _groups(optimizers) for p in group["params"]}
    for name, p in zip(problem.names, problem.params, strict=True):
        if id(p) not in held:
            raise ValueError(
                f"parameter {name!r} is trainable but not in the optimizer: freeze it by"
                " requires_grad_(False), or choose the parameters to measure by params= of the monitor"
                " or of a Problem"
            )
    foreign = len(held - {id(p) for p in problem.model.parameters()})
    if foreign and problem.all_trainable:
        raise ValueError(
            f"the optimizer holds {foreign} parameters that are not the model's, so its steps depend"
            " on more than the model's curvature; choose the parameters to measure by params="
        )


def in_rule_coordinates(
    problem: P, rule: UpdateRule, optimizers: Sequence[torch.optim.Optimizer]
) -> P:
    """Return ``problem`` in the coordinates in which ``rule`` has one learning rate for all parameters.

    The coordinates of a preconditioned rule include learning rates by group, a diagonal preconditioner
    and weight decay of the matrix. Parameters that batch norm cancels in training are constant there.
    Any other preconditioner is left to :func:`outside_coordinates`. For other rules, and for an unknown
    one, only the sign of the loss is changed.

    Raises:
        ValueError: if the rule has groups and ``optimizers``, which assign parameters to groups, is
            empty; or if a parameter is in no group.
    """
    sign = -1.0 if rule.maximize else 1.0
    if not rule.preconditioned or rule.unknown is not None:
        return problem.transformed(sign=sign)
    scale: list[Tensor | float] | None = None
    decays: list[Tensor | float] = [rule.weight_decay] * len(problem.params)
    indices: list[int] = []
    if rule.group_lrs or rule.group_weight_decays or rule.group_filtered_decays:
        indices = _group_indices(problem, optimizers)
        if rule.group_weight_decays:
            decays = [rule.group_weight_decays[i] for i in indices]
        if rule.group_lrs:
            scale = [(rule.group_lrs[i] / rule.lr) ** 0.5 if rule.lr else 1.0 for i in indices]
    if rule.preconditioner is not None:
        p = rule.preconditioner.over(problem.params)
        if isinstance(p, DiagonalPreconditioner):
            cancelled: frozenset[str] = frozenset()
            if isinstance(problem, DifferentiableLoss):
                cancelled = problem.cancelled
            roots = zip(problem.names, p.roots(), strict=True)
            scale = [_factor(root, problem.dtype, name in cancelled) for name, root in roots]
            if rule.group_filtered_decays:
                # P(H + Λ) with Λ = λ''/P, where P is not zero.
                filtered = [rule.group_filtered_decays[i] for i in indices]
                pairs = zip(decays, filtered, p.entries, strict=True)
                decays = [
                    decay + _quotient(added, entry, problem.dtype) for decay, added, entry in pairs
                ]
    return problem.transformed(sign=sign, scale=scale, weight_decay=decays)


def _factor(root: Tensor | float, dtype: torch.dtype, is_cancelled: bool) -> Tensor | float:
    """Return the scale of a parameter from its root of P, 0 for an adaptive step that is not defined.

    Adaptive steps, whose roots are tensors, divide by the gradient, and that of a bias which batch norm
    cancels in training is zero.
    """
    if not isinstance(root, Tensor):
        return root
    return 0.0 if is_cancelled else root.to(dtype)


def _quotient(decay: float, entry: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Return ``decay / entry``, zero where the entry is zero."""
    if not decay:
        return 0.0
    if not isinstance(entry, Tensor):
        return decay / entry if entry else 0.0
    return (decay / entry).masked_fill_(entry == 0, 0.0).to(dtype)


def outside_coordinates(rule: UpdateRule, params: Sequence[Tensor]) -> StepPreconditioner | None:
    """Return P over ``params`` unless :func:`in_rule_coordinates` includes it; then ``None``."""
    p = None if rule.preconditioner is None else rule.preconditioner.over(params)
    return None if isinstance(p, DiagonalPreconditioner) else p


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _group_indices(problem: MeanLoss, optimizers: Sequence[torch.optim.Optimizer]) -> list[int]:
    """Return the index of each parameter's group."""
    if not optimizers:
        raise ValueError(
            "update_rule has several groups: pass optimizer=, which assigns parameters to groups"
        )
    indices = {id(p): i for i, group in enumerate(_groups(optimizers)) for p in group["params"]}
    for name, p in zip(problem.names, problem.params, strict=True):
        if id(p) not in indices:
            raise ValueError(f"parameter {name!r} is in none of the optimizer's groups")
    return [indices[id(p)] for p in problem.params]
