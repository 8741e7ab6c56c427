"""Readers of SGD and averaged SGD, and of what changes the limit of an optimizer inside.

The preconditioner of SGD is that of different learning rates by group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stableopt.stability.rules.readers.diagonal import Step, diagonal_rule
from stableopt.stability.rules.readers.param_groups import one
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_asgd", "read_lookahead", "read_sam", "read_sgd"]


def read_sgd(optimizer: torch.optim.Optimizer, *, full_batch: bool = False) -> UpdateRule:
    """Read ``torch.optim.SGD`` and its subclasses."""
    groups = optimizer.param_groups
    momentum, dampening, nesterov, maximize = (
        one(key, [group.get(key, 0) for group in groups])
        for key in ("momentum", "dampening", "nesterov", "maximize")
    )
    lrs = tuple(float(group["lr"]) for group in groups)
    decays = tuple(float(group["weight_decay"]) for group in groups)
    one_lr, one_decay = len(set(lrs)) == 1, len(set(decays)) == 1
    # A shared decay is a part of the limit; with different rates it is a part of the scaled matrix.
    in_limit = one_decay and one_lr
    return UpdateRule(
        lr=max(lrs),
        momentum=float(momentum),
        dampening=float(dampening),
        nesterov=bool(nesterov),
        weight_decay=decays[0] if in_limit else 0.0,
        maximize=bool(maximize),
        full_batch=full_batch,
        group_lrs=() if one_lr else lrs,
        group_weight_decays=() if in_limit else decays,
    )


def read_asgd(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.ASGD``: SGD with a falling rate, which the state has for the next step."""

    def rate(step: Step) -> float:
        return float(step.state["eta"] if "eta" in step.state else step.group["lr"])

    return diagonal_rule(
        optimizer,
        lambda step: torch.ones_like(step.state["ax"]),
        rate=rate,
        shrink=lambda step: rate(step) * float(step.group["lambd"]),
    )


def read_lookahead(optimizer: Any) -> UpdateRule:
    """Read Lookahead (Zhang et al., 2019) over an optimizer that is known."""
    inner = UpdateRule.from_optimizer(optimizer.optimizer)
    if inner.unknown is not None:
        return inner
    if getattr(optimizer, "pullback_momentum", "none") != "none" or inner.lookahead is not None:
        reason = "Lookahead that changes the momentum, or within another one, is not read"
        return UpdateRule.unknown_step(optimizer, reason)
    return replace(inner, lookahead=(int(optimizer.k), float(optimizer.alpha)))


def read_sam(optimizer: Any) -> UpdateRule:
    """Return a rule without a limit: that of SAM needs the gradient's norm before it climbs."""
    return UpdateRule.unknown_step(
        optimizer,
        "the limit of SAM depends on the norm of the gradient where it climbs from, which it does not"
        " keep: pass update_rule=lambda optimizer: UpdateRule(lr=..., ascent=rho / norm)",
    )
