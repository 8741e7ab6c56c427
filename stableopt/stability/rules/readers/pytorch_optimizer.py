r"""Readers of ``pytorch_optimizer`` (4.1) and ``prodigyopt``: Adan, AdEMAMix, Prodigy and SophiaH.

Adan and AdEMAMix add two averages of gradients, which is a linear filter
(:mod:`~stableopt.stability.rules.filters`). The readers follow the code of the classes, without
importing the packages.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.stability.rules.filters import Filter
from stableopt.stability.rules.readers.adaptive import averaged
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule, lr_times_decay
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_adan", "read_ademamix", "read_prodigy", "read_sophia", "unknown_option"]

_NOT_LINEAR = ("use_gc", "adanorm", "cautious", "stable_adamw")
"""Options whose change of the step is not a filter or a diagonal matrix."""


def unknown_option(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return an unknown rule if an option in ``_NOT_LINEAR`` is on, else ``None``."""
    for name in _NOT_LINEAR:
        if any(group.get(name) for group in optimizer.param_groups):
            reason = (
                f"{type(optimizer).__name__} with {name}=True takes steps without a known limit"
            )
            return UpdateRule.unknown_step(optimizer, reason)
    return None


def _decoupled(group: Group) -> bool:
    return bool(group["weight_decouple"])


def _shrink(step: Step) -> float:
    if not _decoupled(step.group):
        return 0.0
    fixed = step.group.get("fixed_decay", False)
    return float(step.group["weight_decay"]) if fixed else lr_times_decay(step)


def _inverse_root(step: Step, beta: float) -> Tensor:
    """Return the inverse root of the second moment with bias correction and eps."""
    root = step.state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta**step.steps)
    inverse: Tensor = (root + step.group["eps"]).reciprocal()
    return inverse


class _Average(NamedTuple):
    """``weight`` times an exponential average with decay ``beta`` of the filter ``num`` of gradients."""

    beta: float
    weight: float
    num: tuple[float, ...] = (1.0,)


def _sum_of_averages(first: _Average, second: _Average) -> Filter:
    """Return the filter of the sum of two averages."""

    def product(a: tuple[float, ...], b: tuple[float, ...]) -> list[float]:
        coefficients = [0.0] * 3
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                coefficients[i + j] += x * y
        return coefficients

    def term(average: _Average, other: _Average) -> list[float]:
        scale = average.weight * (1 - average.beta)
        return [scale * x for x in product(average.num, (1.0, -other.beta))]

    num = tuple(x + y for x, y in zip(term(first, second), term(second, first), strict=True))
    return num, tuple(product((1.0, -first.beta), (1.0, -second.beta)))


def read_adan(optimizer: Any) -> UpdateRule:
    r"""Read Adan (Xie et al., 2022): the averages of g and of :math:`\beta_2(g_t - g_{t-1})`.

    Without ``weight_decouple``, weight decay divides the parameters by :math:`1+\eta\lambda` after the
    step.
    """

    def kept(step: Step) -> float:
        decay = float(step.group["lr"]) * float(step.group["weight_decay"])
        return 1 - decay if step.group["weight_decouple"] else 1 / (1 + decay)

    def rate(step: Step) -> float:
        return float(step.group["lr"]) * (1 if step.group["weight_decouple"] else kept(step))

    def averages(step: Step) -> Filter:
        beta1, beta2, _ = (float(beta) for beta in step.group["betas"])
        gradients = _Average(beta1, 1 / (1 - beta1**step.steps))
        differences = _Average(beta2, beta2 / (1 - beta2**step.steps), (1.0, -1.0))
        return _sum_of_averages(gradients, differences)

    return unknown_option(optimizer) or diagonal_rule(
        optimizer,
        lambda step: _inverse_root(step, float(step.group["betas"][2])),
        filter=averages,
        rate=rate,
        decoupled=True,
        shrink=lambda step: 1 - kept(step),
    )


def read_ademamix(optimizer: Any) -> UpdateRule:
    """Read AdEMAMix (Pagliardini et al., 2024): a fast average, and alpha times a slow one.

    The slow average has no bias correction.
    """

    def averages(step: Step) -> Filter:
        beta1, _, beta3 = (float(beta) for beta in step.group["betas"])
        warmup = step.group["t_alpha_beta3"]
        beta3 = float(optimizer.schedule_beta3(warmup, step.steps, beta1, beta3))
        alpha = float(optimizer.schedule_alpha(warmup, step.steps, float(step.group["alpha"])))
        fast = _Average(beta1, 1 / (1 - beta1**step.steps))
        return _sum_of_averages(fast, _Average(beta3, alpha))

    return unknown_option(optimizer) or diagonal_rule(
        optimizer,
        lambda step: _inverse_root(step, float(step.group["betas"][1])),
        filter=averages,
        decoupled=_decoupled,
        shrink=_shrink,
    )


def read_prodigy(optimizer: Any) -> UpdateRule:
    r"""Read Prodigy (Mishchenko & Defazio, 2024), of ``prodigyopt`` or ``pytorch_optimizer``.

    With the current estimate d of the distance, it is Adam with the learning rate d lr. Its moments are
    those of d g, so :math:`P = d/(\sqrt v + d\epsilon)`.
    """
    is_prodigyopt = "use_bias_correction" in optimizer.param_groups[0]
    if is_prodigyopt:
        bias_correction, decoupled = "use_bias_correction", "decouple"
    else:
        bias_correction, decoupled = "bias_correction", "weight_decouple"
    if any(group["eps"] is None for group in optimizer.param_groups):
        reason = "Prodigy with eps=None takes steps without a known limit"
        return UpdateRule.unknown_step(optimizer, reason)

    def rate(step: Step) -> float:
        group, lr = step.group, float(step.group["d"]) * float(step.group["lr"])
        if not group[bias_correction]:
            return lr
        beta1, beta2 = (float(beta) for beta in group["betas"])
        steps = group["k"] if is_prodigyopt else group["step"] - 1
        return lr * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) if steps else lr

    def entries(step: Step) -> Tensor:
        d = float(step.group["d"])
        diagonal: Tensor = d / (step.state["exp_avg_sq"].sqrt() + d * step.group["eps"])
        return diagonal

    def shrink(step: Step) -> float:
        fixed = step.group.get("fixed_decay", False)
        decay = float(step.group["weight_decay"]) if step.group[decoupled] else 0.0
        return decay if fixed else decay * rate(step)

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        rate=rate,
        shrink=shrink,
        # pytorch_optimizer adds coupled decay to the gradients only after it has used them.
        weight_decay=lambda group: (
            float(group["weight_decay"]) if is_prodigyopt and not group[decoupled] else 0.0
        ),
    )


def read_sophia(optimizer: Any) -> UpdateRule:
    r"""Read SophiaH (Liu et al., 2023): :math:`P = 1/\max(h,\epsilon)`, 0 where the update is clipped.

    A clipped coordinate does not depend on the gradient. The average has no bias correction.
    """

    def entries(step: Step) -> Tensor:
        inverse: Tensor = step.state["hessian_moment"].clamp(min=step.group["eps"]).reciprocal()
        clipped = (step.state["momentum"] * inverse).abs() >= step.group["p"]
        return torch.where(clipped, 0.0, inverse)

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        decoupled=_decoupled,
        shrink=_shrink,
    )
