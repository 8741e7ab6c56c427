"""Reader of ``torch.optim.SGD``, whose preconditioner is that of different learning rates."""

from __future__ import annotations

import torch

from stableopt.stability.rules.readers.param_groups import one
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_sgd"]


def read_sgd(optimizer: torch.optim.SGD, *, full_batch: bool = False) -> UpdateRule:
    """Read ``torch.optim.SGD`` and its subclasses."""
    groups = optimizer.param_groups
    momentum, dampening, nesterov, maximize = (
        one(key, [group[key] for group in groups])
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
