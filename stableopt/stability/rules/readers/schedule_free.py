r"""Readers of ``schedulefree``: SGD, AdamW and RAdam without a schedule (Defazio et al., 2024).

The optimizer takes steps in z and averages them in x. The parameters are
:math:`y = (1-\beta)z + \beta x`, where gradients are taken and margins measured. With the weight c of
the newest z in x, the steps of y have a share :math:`\beta` of an average of gradients with momentum
1 - c:

.. math:: z' = z - \gamma u, \quad x' = (1-c)x + cz', \qquad
    \lambda_{\max}(PH) \le \frac{2(2-c)}{\gamma\,[(2-c)(1-\beta)+c\beta]} - \lambda
    \;\to\; \frac{2}{(1-\beta)\gamma} - \lambda \quad (c \to 0).

The wrapper filters the steps of another optimizer in the same way, by
:math:`\frac{(1-\beta)(z-1+c)+\beta cz}{z-1+c}`. After ``optimizer.eval()`` the parameters are x, and the
rule is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableopt.stability.rules.readers.adaptive import rectified
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.readers.param_groups import common_value, params_of
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_adamw", "read_radam", "read_sgd", "read_wrapper"]

_THRESHOLD = 4.0
"""Averaging length of the second moment up to which this RAdam does not use it."""

_EVAL = (
    "{} is in eval mode, where the parameters are averages, at which it takes no steps: call"
    " optimizer.train() before measuring"
)


def _weight(group: Group) -> float:
    """Return c of the last step, 1 before the first."""
    if not group.get("k"):
        return 1.0
    total = float(group["weight_sum"])
    newest = group["k"] ** group["r"] * float(group["lr_max"]) ** group["weight_lr_power"]
    return float(newest / total) if total else 0.0


def _common_weight(groups: Sequence[Group]) -> float:
    weights = [_weight(group) for group in groups]
    return common_value("the weight of the newest point", weights)


def _rate(group: Group) -> float:
    """Return gamma of the last step, with warm-up; before the first step, that of the first."""
    if group["k"]:
        return float(group["scheduled_lr"])
    return float(group["lr"]) / max(1, int(group.get("warmup_steps", 0)))


def _unknown(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return an unknown rule if the parameters are x or do not move, else ``None``."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if group["k"] and not group["train_mode"]:
            return UpdateRule.unknown_step(optimizer, _EVAL.format(name))
        if group["k"] and not _weight(group):
            reason = f"{name} does not move the parameters in its first steps"
            return UpdateRule.unknown_step(optimizer, reason)
    return None


def read_sgd(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``schedulefree.SGDScheduleFree``."""
    params_of(optimizer)  # raises for complex ones
    groups = optimizer.param_groups
    lrs = tuple(_rate(group) for group in groups)
    decays = tuple(float(group["weight_decay"]) for group in groups)
    in_limit = len(set(lrs)) == len(set(decays)) == 1
    beta = 1 - _common_weight(groups)
    return _unknown(optimizer) or UpdateRule(
        lr=max(lrs),
        momentum=beta,
        dampening=beta,
        momentum_share=float(common_value("momentum", [group["momentum"] for group in groups])),
        weight_decay=decays[0] if in_limit else 0.0,
        group_lrs=lrs if len(set(lrs)) > 1 else (),
        group_weight_decays=() if in_limit else decays,
    )


def _adaptive(optimizer: torch.optim.Optimizer, entries: Callable[[Step], Tensor]) -> UpdateRule:
    def momentum(step: Step) -> tuple[float, float, float]:
        beta = 1 - _weight(step.group)
        return beta, beta, float(step.group["betas"][0])

    return _unknown(optimizer) or diagonal_rule(
        optimizer,
        entries,
        momentum=momentum,
        rate=lambda step: _rate(step.group),
        weight_decay=lambda group: 0.0,
        filtered_decay=lambda group: float(group["weight_decay"]),
    )


def _inverse(step: Step) -> Tensor:
    corrected = step.state["exp_avg_sq"] / (1 - float(step.group["betas"][1]) ** step.steps)
    inverse: Tensor = (corrected.sqrt() + step.group["eps"]).reciprocal()
    return inverse


def read_adamw(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``schedulefree.AdamWScheduleFree``: weight decay is added to the preconditioned gradient."""
    return _adaptive(optimizer, _inverse)


def read_radam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``schedulefree.RAdamScheduleFree``, whose rectification is a part of the rate."""

    def entries(step: Step) -> Tensor:
        if rectified(step, _THRESHOLD) is None:
            return torch.ones_like(step.state["exp_avg_sq"])
        return _inverse(step)

    return _adaptive(optimizer, entries)


def read_wrapper(optimizer: Any) -> UpdateRule:
    """Read ``schedulefree.ScheduleFreeWrapper`` over an optimizer that is known and has no decay."""
    inner, beta = UpdateRule.from_optimizer(optimizer.base), float(optimizer.momentum)
    groups, name = optimizer.param_groups, type(optimizer).__name__
    if inner.unknown is not None:
        return inner
    if any(group.get("k") for group in groups) and not optimizer.train_mode:
        return UpdateRule.unknown_step(optimizer, _EVAL.format(name))
    decays = optimizer.weight_decay_at_y, inner.weight_decay, inner.decoupled_weight_decay
    if any((*decays, *inner.group_weight_decays)) or inner.lookahead is not None:
        reason = f"{name} with weight decay, or over Lookahead, takes steps without a known limit"
        return UpdateRule.unknown_step(optimizer, reason)
    averaging = {"r": optimizer.r, "weight_lr_power": optimizer.weight_lr_power}
    c = _common_weight([{**group, **averaging} for group in groups])
    num, den = inner.linear_step.as_filter
    return replace(
        inner,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        momentum_share=1.0,
        filter=(
            tuple(np.polymul(num, (1 - beta + beta * c, -(1 - beta) * (1 - c))).tolist()),
            tuple(np.polymul(den, (1.0, -(1 - c))).tolist()),
        ),
    )
