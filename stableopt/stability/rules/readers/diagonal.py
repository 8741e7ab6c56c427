r"""`diagonal_rule`, `stepped_rule`: update rules from the last step of each parameter.

Each parameter tensor i has a learning rate :math:`\eta_i`, the entries :math:`P_i` of its last step, and
a factor :math:`c_i = 1-\eta_i\lambda'_i` from decoupled weight decay. The rule has the largest rate
:math:`\eta` for all parameters, and the preconditioner :math:`P_i\eta_i/\eta`. If the factors differ,
for instance because biases do not decay, the preconditioner includes them too. With
:math:`K=\eta P^{1/2}HP^{1/2}` and the diagonal C of all :math:`c_i`, the step's eigenvalues z make

.. math:: z^2 - z\,[C+\beta-uK] + \beta C - wK

singular. Every matrix is symmetric, so the Rayleigh quotients of the null vector satisfy the scalar
equation of one mode, to which Jury's conditions apply. The step is stable exactly if
:math:`[A(1+\beta)+B(1-\tau)]\,K \preceq (1+\beta)(1+C)`, which limits the top eigenvalue of
:math:`2(1+C)^{-1}PH` (notation of :mod:`~stableopt.stability.rules.limits`). The limit on the
non-uniformity, exact in one dimension only, is then that of c = 1. Other filters of the gradients have
a limit only if all factors agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view
from stableopt.stability.rules.filters import Filter, agree
from stableopt.stability.rules.preconditioner import (
    DiagonalPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
    decay_factor,
)
from stableopt.stability.rules.readers.param_groups import (
    NOT_STEPPED,
    common_value,
    decay_of,
    params_of,
    step_counts,
)
from stableopt.stability.rules.update_rule import UpdateRule, maximizes

__all__ = ["Step", "diagonal_rule", "lr_times_decay", "stepped_rule"]

Group = dict[str, Any]


class Step(NamedTuple):
    """The last step of one parameter tensor, ``param``; before any step, ``param`` is ``None``."""

    group: Group
    state: dict[str, Any]
    steps: float
    param: Tensor | None = None


def lr_times_decay(step: Step) -> float:
    """Return eta lambda, the share of the parameter that most decoupled weight decay removes."""
    return float(step.group["lr"]) * float(step.group["weight_decay"])


Build = Callable[[Sequence[Tensor], Sequence[tuple[Step | None, float]]], StepPreconditioner]
"""``(parameters, [(last step, factor of its preconditioner), ...]) -> preconditioner``."""


def diagonal_rule(
    optimizer: torch.optim.Optimizer, entries: Callable[[Step], Tensor], **options: Any
) -> UpdateRule:
    """Return the rule of an optimizer with a diagonal preconditioner.

    A parameter without a step has entries of zero; before any step, the preconditioner is not known.

    Args:
        optimizer: the optimizer.
        entries: the diagonal of P, with bias corrections and without the learning rate.
        options: keyword arguments of :func:`stepped_rule`.
    """

    def build(
        params: Sequence[Tensor], steps: Sequence[tuple[Step | None, float]]
    ) -> StepPreconditioner:
        with torch.no_grad():
            diagonal = (0.0 if step is None else entries(step) * factor for step, factor in steps)
            return DiagonalPreconditioner(params, diagonal)

    return stepped_rule(optimizer, build, diagonal=True, **options)


def stepped_rule(
    optimizer: torch.optim.Optimizer,
    build: Build,
    *,
    diagonal: bool,
    momentum: Callable[[Step], tuple[float, float, float]] = lambda step: (0.0, 0.0, 1.0),
    filter: Callable[[Step], Filter] | None = None,
    rate: Callable[[Step], float] = lambda step: float(step.group["lr"]),
    decoupled: bool | Callable[[Group], bool] = False,
    shrink: Callable[[Step], float] | None = None,
    weight_decay: Callable[[Group], float] | None = None,
    filtered_decay: Callable[[Group], float] = lambda group: 0.0,
) -> UpdateRule:
    """Return the rule of an optimizer from the last step of each parameter.

    Args:
        optimizer: the optimizer.
        build: returns the preconditioner.
        diagonal: whether it is diagonal.
        momentum: beta, tau and nu, the same for all parameters.
        filter: a filter of the gradients, instead of ``momentum``.
        rate: the learning rate of the step.
        decoupled: whether weight decay is decoupled, and not a part of the gradient.
        shrink: the share 1 - c of the parameter that decoupled weight decay removes, by default its
            learning rate times ``weight_decay``.
        weight_decay: coupled weight decay, by default ``weight_decay`` unless it is decoupled.
        filtered_decay: decay that joins the gradient after the preconditioner.
    """

    def is_decoupled(group: Group) -> bool:
        return decoupled(group) if callable(decoupled) else decoupled

    def lr_decay(step: Step) -> float:
        return lr_times_decay(step) if is_decoupled(step.group) else 0.0

    def coupled_decay(group: Group) -> float:
        return 0.0 if is_decoupled(group) else float(group["weight_decay"])

    shrink, weight_decay = shrink or lr_decay, weight_decay or coupled_decay
    groups, params = optimizer.param_groups, params_of(optimizer)
    counts = step_counts(optimizer)
    steps = [
        Step(group, _real(optimizer.state[p]), counts[id(p)], p) if id(p) in counts else None
        for group in groups
        for p in group["params"]
    ]
    taken = [step for step in steps if step is not None]
    # Before any step, use the settings of the first.
    last_steps = taken or [Step(group, {}, 1.0) for group in groups]
    lr = max(rate(step) for step in last_steps)
    shrinks = [shrink(step) for step in last_steps]
    same_shrink = agree(min(shrinks), max(shrinks))
    filters = None if filter is None else [filter(step) for step in last_steps]
    different = None
    if filters and not all(agree(filters[0], other) for other in filters):
        different = "filters of the gradients"
    elif filters and not same_shrink:
        different = "decoupled weight decay"
    if different is not None:
        return UpdateRule.unknown_step(
            optimizer,
            f"{type(optimizer).__name__} has parameters of different {different}, for which no limit is"
            " known",
        )

    def factor(step: Step | None) -> float:
        if step is None or not lr:
            return 1.0
        return rate(step) / lr * (1.0 if same_shrink else decay_factor(shrink(step)))

    preconditioner: StepPreconditioner
    if taken:
        preconditioner = build(params, [(step, factor(step)) for step in steps])
        preconditioner.shrink = 0.0 if same_shrink else max(shrinks)
    else:
        reason = NOT_STEPPED.format(type(optimizer).__name__)
        preconditioner = UnknownPreconditioner(reason, diagonal=diagonal)
    beta, tau, share = (
        (0.0, 0.0, 1.0) if filters else _common_momentum([momentum(step) for step in last_steps])
    )
    return UpdateRule(
        lr=lr,
        momentum=beta,
        dampening=tau,
        momentum_share=share,
        filter=filters[0] if filters else None,
        **decay_of([weight_decay(group) for group in groups]),
        decoupled_weight_decay=shrinks[0] / lr if same_shrink and lr else 0.0,
        **_filtered_decay_of(groups, last_steps, lr, rate, filtered_decay),
        maximize=common_value("maximize", maximizes(optimizer)),
        preconditioner=preconditioner,
    )


def _filtered_decay_of(
    groups: Sequence[Group],
    steps: Sequence[Step],
    lr: float,
    rate: Callable[[Step], float],
    decay: Callable[[Group], float],
) -> dict[str, Any]:
    """Return the arguments of ``UpdateRule`` for decay that joins the gradient after P, by group.

    A group without a step does not decay.
    """
    by_group = {
        id(step.group): decay(step.group) * (rate(step) / lr if lr else 1.0) for step in steps
    }
    if len(set(by_group.values())) == 1:
        return {"filtered_weight_decay": by_group.popitem()[1]}
    return {"group_filtered_decays": tuple(by_group.get(id(group), 0.0) for group in groups)}


def _real(state: dict[str, Any]) -> dict[str, Any]:
    return {key: real_view(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def _common_momentum(momenta: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    first = momenta[0]
    for other in momenta[1:]:
        if not agree(first, other):
            raise ValueError(
                f"parameters have momentum (beta, tau, nu) of {first} and {other}: expected one for"
                " all, so the same betas in all groups, and as many steps where the momentum changes"
                " with them; or pass update_rule="
            )
    return first
