"""Readers of SGD and averaged SGD, and of Lookahead and SAM, which wrap another optimizer.

Learning rates that differ between groups are a diagonal preconditioner.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stableopt.stability.rules.ascent import ascent_norm
from stableopt.stability.rules.filters import no_lookahead_edge
from stableopt.stability.rules.preconditioner import AwaitedStep
from stableopt.stability.rules.readers.diagonal import Step, diagonal_rule
from stableopt.stability.rules.readers.param_groups import common_value
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_asgd", "read_lookahead", "read_sam", "read_sgd"]


def read_sgd(optimizer: torch.optim.Optimizer, *, full_batch: bool = False) -> UpdateRule:
    """Read ``torch.optim.SGD`` and its subclasses."""
    groups = optimizer.param_groups
    momentum, dampening, nesterov, maximize = (
        common_value(key, [group.get(key, 0) for group in groups])
        for key in ("momentum", "dampening", "nesterov", "maximize")
    )
    lrs = tuple(float(group["lr"]) for group in groups)
    decays = tuple(float(group["weight_decay"]) for group in groups)
    same_lr, same_decay = len(set(lrs)) == 1, len(set(decays)) == 1
    # With one rate a shared decay lowers the limit. Otherwise decay is a part of the scaled Hessian.
    in_limit = same_decay and same_lr
    return UpdateRule(
        lr=max(lrs),
        momentum=float(momentum),
        dampening=float(dampening),
        nesterov=bool(nesterov),
        weight_decay=decays[0] if in_limit else 0.0,
        maximize=bool(maximize),
        full_batch=full_batch,
        group_lrs=() if same_lr else lrs,
        group_weight_decays=() if in_limit else decays,
    )


def read_asgd(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.ASGD``: SGD with a decreasing rate; ``eta`` is the rate of the next step."""

    def rate(step: Step) -> float:
        return float(step.state["eta"] if "eta" in step.state else step.group["lr"])

    return diagonal_rule(
        optimizer,
        lambda step: torch.ones_like(step.state["ax"]),
        rate=rate,
        shrink=lambda step: rate(step) * float(step.group["lambd"]),
    )


def read_lookahead(optimizer: Any) -> UpdateRule:
    """Read Lookahead (Zhang et al., 2019) over a known optimizer."""
    inner = UpdateRule.from_optimizer(optimizer.optimizer)
    if inner.unknown is not None:
        return inner
    if getattr(optimizer, "pullback_momentum", "none") != "none" or inner.lookahead is not None:
        reason = (
            "Lookahead that changes the momentum, or over another Lookahead, has no known limit"
        )
        return UpdateRule.unknown_step(optimizer, reason)
    # Decay that differs is in P, as it is without Lookahead, where that is exact.
    no_edge = no_lookahead_edge(
        0.0 if inner.preconditioner is None else inner.preconditioner.shrink
    )
    if no_edge is not None:
        return UpdateRule.unknown_step(optimizer, no_edge)
    return replace(inner, lookahead=(int(optimizer.k), float(optimizer.alpha)))


def read_sam(optimizer: Any) -> UpdateRule:
    """Read SAM (Foret et al., 2021) over SGD, whose ascent a monitor has observed.

    The class may be any that has ``first_step``, ``base_optimizer``, and ``rho`` in its groups.
    """
    groups, inner = optimizer.param_groups, UpdateRule.from_optimizer(optimizer.base_optimizer)
    if not inner.has_limit:
        return inner
    if any(group.get("adaptive") for group in groups) or getattr(optimizer, "use_gc", False):
        reason = "adaptive SAM, or SAM of centralised gradients, has no known limit"
        return UpdateRule.unknown_step(optimizer, reason)
    if inner.preconditioned or inner.lookahead is not None:
        reason = "SAM over anything but SGD with one learning rate has no known limit"
        return UpdateRule.unknown_step(optimizer, reason)
    rho, norm = (
        common_value("rho", [float(group["rho"]) for group in groups]),
        ascent_norm(optimizer),
    )
    if norm is not None:
        return replace(inner, ascent=rho / norm)
    reason = (
        "the limit of SAM depends on the gradient's norm before the ascent step, which SAM does not"
        " keep: a StabilityMonitor observes it; elsewhere pass update_rule=lambda optimizer:"
        " UpdateRule(lr=..., ascent=rho / norm)"
    )
    return replace(inner, preconditioner=AwaitedStep(reason))
