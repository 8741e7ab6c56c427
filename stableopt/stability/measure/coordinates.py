"""The coordinates in which an optimizer's step is plain gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.curvature import Problem
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["as_seen_by"]


def as_seen_by(
    problem: Problem, rule: UpdateRule, optimizer: torch.optim.Optimizer | None
) -> Problem:
    """Return ``problem`` in the coordinates in which ``rule`` is one learning rate for all.

    A diagonal preconditioner goes into the coordinates; of another only the weight decay does, and of
    one that is not known nothing.

    Raises:
        ValueError: if the rule has groups and there is no optimizer to say which parameter is in
            which, or if a parameter is in none of them.
    """
    sign = -1.0 if rule.maximize else 1.0
    if not rule.preconditioned or rule.unknown is not None:
        return problem.transformed(sign=sign)
    scale: list[Tensor | float] | None = None
    decays = [rule.weight_decay] * len(problem.params)
    if rule.group_lrs or rule.group_weight_decays:
        of = _groups_of(problem, optimizer)
        if rule.group_weight_decays:
            decays = [rule.group_weight_decays[index] for index in of]
        if rule.group_lrs:
            scale = [(rule.group_lrs[i] / rule.lr) ** 0.5 if rule.lr else 1.0 for i in of]
    if rule.preconditioner is not None:
        own = rule.preconditioner.over(problem.params)
        if isinstance(own, DiagonalPreconditioner):
            scale = [r.to(problem.dtype) if isinstance(r, Tensor) else r for r in own.roots()]
    return problem.transformed(sign=sign, scale=scale, weight_decay=decays)


def _groups_of(problem: Problem, optimizer: torch.optim.Optimizer | None) -> list[int]:
    """Return the index of each parameter's group."""
    if optimizer is None:
        raise ValueError(
            "update_rule has several groups: only an optimizer tells which parameter is in which"
        )
    groups = {id(p): index for index, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for name, p in zip(problem.names, problem.params, strict=True):
        if id(p) not in groups:
            raise ValueError(f"parameter {name!r} is in none of the optimizer's groups")
    return [groups[id(p)] for p in problem.params]
