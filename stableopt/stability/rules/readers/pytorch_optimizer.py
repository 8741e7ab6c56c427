r"""Readers of ``pytorch_optimizer`` (4.1) and ``prodigyopt``: Adan, AdEMAMix, Prodigy and SophiaH.

Adan and AdEMAMix add two averages of gradients: linear filters, whose limits
:mod:`~stableopt.stability.rules.filters` finds. They follow the code of the classes, and do not import
the packages.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.filters import Filter
from stableopt.stability.rules.readers.adaptive import averaged
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_adan", "read_ademamix", "read_prodigy", "read_sophia", "special"]

_NOT_LINEAR = ("use_gc", "adanorm", "cautious", "stable_adamw")
"""Options that change the gradient or the update beyond a filter and a diagonal matrix."""


def special(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return a rule that is not known, if an option makes the step another one."""
    for name in _NOT_LINEAR:
        if any(group.get(name) for group in optimizer.param_groups):
            reason = f"{type(optimizer).__name__} with {name}=True takes steps that are not read"
            return UpdateRule.unknown_step(optimizer, reason)
    return None


def _shrink(step: Step) -> float:
    group = step.group
    if not group["weight_decouple"]:
        return 0.0
    return float(group["weight_decay"]) * (1.0 if group.get("fixed_decay") else float(group["lr"]))


def _coupled(group: Group) -> float:
    return 0.0 if group["weight_decouple"] else float(group["weight_decay"])


def _inverse_root(step: Step, beta: float) -> Tensor:
    """Return the inverse of the root of the second moment with its bias correction."""
    root = step.state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta**step.steps)
    entry: Tensor = (root + step.group["eps"]).reciprocal()
    return entry


def _two_averages(
    first: tuple[float, float, tuple[float, ...]], second: tuple[float, float, tuple[float, ...]]
) -> Filter:
    """Return the filter of two averages, each (beta, weight, coefficients of what is averaged)."""
    (beta, weight, own), (other, share, their) = first, second

    def product(a: tuple[float, ...], b: tuple[float, ...]) -> list[float]:
        found = [0.0] * 3
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                found[i + j] += x * y
        return found

    one = [weight * (1 - beta) * x for x in product(own, (1.0, -other))]
    two = [share * (1 - other) * x for x in product(their, (1.0, -beta))]
    num = tuple(x + y for x, y in zip(one, two, strict=True))
    return num, tuple(product((1.0, -beta), (1.0, -other)))


def read_adan(optimizer: Any) -> UpdateRule:
    r"""Read Adan (Xie et al., 2022): the averages of g and of :math:`\beta_2(g_t - g_{t-1})`.

    Its weight decay divides the parameters by :math:`1+\eta\lambda` after the step, unless it is
    decoupled.
    """

    def kept(step: Step) -> float:
        decay = float(step.group["lr"]) * float(step.group["weight_decay"])
        return 1 - decay if step.group["weight_decouple"] else 1 / (1 + decay)

    def rate(step: Step) -> float:
        return float(step.group["lr"]) * (1 if step.group["weight_decouple"] else kept(step))

    def averages(step: Step) -> Filter:
        beta1, beta2, _ = (float(beta) for beta in step.group["betas"])
        corrections = 1 - beta1**step.steps, 1 - beta2**step.steps
        return _two_averages(
            (beta1, 1 / corrections[0], (1.0,)), (beta2, beta2 / corrections[1], (1.0, -1.0))
        )

    return special(optimizer) or diagonal_rule(
        optimizer,
        lambda step: _inverse_root(step, float(step.group["betas"][2])),
        filter=averages,
        rate=rate,
        shrink=lambda step: 1 - kept(step),
        weight_decay=lambda group: 0.0,
    )


def read_ademamix(optimizer: Any) -> UpdateRule:
    """Read AdEMAMix (Pagliardini et al., 2024): a fast average, and alpha times a slow one.

    The slow average has no bias correction.
    """

    def averages(step: Step) -> Filter:
        beta1, _, beta3 = (float(beta) for beta in step.group["betas"])
        warm = step.group["t_alpha_beta3"]
        beta3 = float(optimizer.schedule_beta3(warm, step.steps, beta1, beta3))
        alpha = float(optimizer.schedule_alpha(warm, step.steps, float(step.group["alpha"])))
        return _two_averages((beta1, 1 / (1 - beta1**step.steps), (1.0,)), (beta3, alpha, (1.0,)))

    return special(optimizer) or diagonal_rule(
        optimizer,
        lambda step: _inverse_root(step, float(step.group["betas"][1])),
        filter=averages,
        shrink=_shrink,
        weight_decay=_coupled,
    )


def read_prodigy(optimizer: Any) -> UpdateRule:
    r"""Read Prodigy (Mishchenko & Defazio, 2024), of ``prodigyopt`` or ``pytorch_optimizer``.

    With its present estimate d of the distance, it is Adam with the rate d lr: its moments hold d g and
    :math:`d^2g^2`, so that :math:`P = d/(\sqrt v + d\epsilon)`.
    """
    of_package = "use_bias_correction" in optimizer.param_groups[0]
    correct, apart = (
        ("use_bias_correction", "decouple")
        if of_package
        else ("bias_correction", "weight_decouple")
    )
    if any(group["eps"] is None for group in optimizer.param_groups):
        reason = "Prodigy with eps=None takes steps that are not read"
        return UpdateRule.unknown_step(optimizer, reason)

    def rate(step: Step) -> float:
        group, lr = step.group, float(step.group["d"]) * float(step.group["lr"])
        if not group[correct]:
            return lr
        beta1, beta2 = (float(beta) for beta in group["betas"])
        steps = group["k"] if of_package else group["step"] - 1
        return lr * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) if steps else lr

    def entries(step: Step) -> Tensor:
        d = float(step.group["d"])
        entry: Tensor = d / (step.state["exp_avg_sq"].sqrt() + d * step.group["eps"])
        return entry

    def shrink(step: Step) -> float:
        fixed = step.group.get("fixed_decay", False)
        taken = float(step.group["weight_decay"]) if step.group[apart] else 0.0
        return taken if fixed else taken * rate(step)

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        rate=rate,
        shrink=shrink,
        # That of pytorch_optimizer adds coupled decay to gradients that it has used already.
        weight_decay=lambda group: (
            float(group["weight_decay"]) if of_package and not group[apart] else 0.0
        ),
    )


def read_sophia(optimizer: Any) -> UpdateRule:
    r"""Read SophiaH (Liu et al., 2023): :math:`P = 1/\max(h,\epsilon)`, 0 where the update is clipped.

    Clipped coordinates do not react to the gradient. The average has no bias correction.
    """

    def entries(step: Step) -> Tensor:
        inverse: Tensor = step.state["hessian_moment"].clamp(min=step.group["eps"]).reciprocal()
        clipped = (step.state["momentum"] * inverse).abs() >= step.group["p"]
        return torch.where(clipped, 0.0, inverse)

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=_shrink,
        weight_decay=_coupled,
    )
