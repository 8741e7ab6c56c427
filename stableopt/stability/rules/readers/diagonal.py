r"""`diagonal_rule`: the update rule of an optimizer with a diagonal preconditioner.

Each parameter tensor i has a rate :math:`\eta_i`, the entries :math:`P_i` of its last step, and a factor
:math:`c_i = 1-\eta_i\lambda'_i` that decoupled weight decay leaves. With the largest rate :math:`\eta`,
the rule is one rate for all with the preconditioner :math:`P_i\eta_i/\eta`. If the factors differ, for
instance because biases do not decay, the preconditioner includes them too. With
:math:`K=\eta P^{1/2}HP^{1/2}` and the diagonal C of all :math:`c_i`, the step's eigenvalues z make

.. math:: z^2 - z\,[C+\beta-uK] + \beta C - wK

singular. Every matrix is symmetric, so the Rayleigh quotients of the null vector form a scalar mode, to
which Jury's conditions apply. The step is stable exactly if
:math:`[A(1+\beta)+B(1-\tau)]\,K \preceq (1+\beta)(1+C)`, which limits the top eigenvalue of
:math:`2(1+C)^{-1}PH` (notation of :mod:`~stableopt.stability.rules.limits`). The limit of the
non-uniformity, which is exact in one dimension only, is then that of c = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.stability.rules.preconditioner import (
    DiagonalPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
)
from stableopt.stability.rules.readers.param_groups import (
    NOT_STEPPED,
    decay_of,
    one,
    params_of,
    step_counts,
)
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["Step", "diagonal_rule"]

Group = dict[str, Any]


class Step(NamedTuple):
    """The last step of one parameter tensor."""

    group: Group
    state: dict[str, Any]
    steps: float


def diagonal_rule(
    optimizer: torch.optim.Optimizer,
    entries: Callable[[Step], Tensor],
    *,
    momentum: Callable[[Step], tuple[float, float, float]],
    rate: Callable[[Step], float] = lambda step: float(step.group["lr"]),
    shrink: Callable[[Group], float] = lambda group: 0.0,
    weight_decay: Callable[[Group], float] = lambda group: float(group["weight_decay"]),
) -> UpdateRule:
    """Return the rule of an optimizer from the last step of each parameter.

    A parameter without a step has entries of zero; before any step, the preconditioner is not known.

    Args:
        optimizer: the optimizer.
        entries: the diagonal of P, with bias corrections and without the learning rate.
        momentum: beta, tau and nu, the same for all parameters.
        rate: the learning rate of the step.
        shrink: the share 1 - c of the parameters that decoupled weight decay removes.
        weight_decay: coupled weight decay.
    """
    groups, params = optimizer.param_groups, params_of(optimizer)
    counts = step_counts(optimizer)
    steps = [
        Step(group, optimizer.state[p], counts[id(p)]) if id(p) in counts else None
        for group in groups
        for p in group["params"]
    ]
    known = [step for step in steps if step is not None]
    # Before any step, the settings of the first.
    asked = known or [Step(group, {}, 1.0) for group in groups]
    beta, tau, share = _same_momentum([momentum(step) for step in asked])
    lr = max(rate(step) for step in asked)
    shrinks = [shrink(group) for group in groups]
    in_limit = len(set(shrinks)) == 1

    def folded() -> Iterator[Tensor | float]:
        for step in steps:
            if step is None:
                yield 0.0
                continue
            factor = rate(step) / lr if lr else 1.0
            yield entries(step) * (factor if in_limit else factor * _fold(shrink(step.group)))

    preconditioner: StepPreconditioner
    if known:
        with torch.no_grad():
            preconditioner = DiagonalPreconditioner(params, folded())
    else:
        preconditioner = UnknownPreconditioner(NOT_STEPPED.format(type(optimizer).__name__))
    return UpdateRule(
        lr=lr,
        momentum=beta,
        dampening=tau,
        momentum_share=share,
        **decay_of([weight_decay(group) for group in groups]),
        decoupled_weight_decay=shrinks[0] / lr if in_limit and lr else 0.0,
        maximize=bool(one("maximize", [group.get("maximize", False) for group in groups])),
        preconditioner=preconditioner,
    )


def _fold(shrink: float) -> float:
    if not shrink < 2:
        raise ValueError(
            f"decoupled weight decay removes {shrink} of the parameters a step: expected less than 2"
        )
    return 2 / (2 - shrink)


def _same_momentum(forms: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    beta, tau, share = forms[0]
    for other in forms[1:]:
        # Bias corrections near 1 have rounding errors.
        if max(abs(a - b) for a, b in zip(forms[0], other, strict=True)) > 1e-12:
            raise ValueError(
                f"parameters have momentum (beta, tau, nu) of {forms[0]} and {other}: expected one"
                " for all, so the same betas in all groups, and as many steps where the momentum"
                " changes with them; or pass update_rule="
            )
    return beta, tau, share
