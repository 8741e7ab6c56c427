r"""Readers of ``torch.optim``'s adaptive optimizers, and of Adam with a state of 8 bits.

The preconditioner includes bias corrections, as in Cohen et al., *Adaptive gradient methods at the
edge of stability* (2022): Adam's is

.. math::
    P_t = \mathrm{diag}\left[(1-\beta_1^t)\left(\sqrt{v_t/(1-\beta_2^t)}+\epsilon\right)\right]^{-1},

so its limit is :math:`(2+2\beta_1)/((1-\beta_1)\eta)` from the first step on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.parameters import real_view
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "adam_entries",
    "averaged",
    "coupled_decay",
    "decayed_apart",
    "decoupled_shrink",
    "late_eps_entries",
    "read_adadelta",
    "read_adagrad",
    "read_adam",
    "read_adamax",
    "read_bitsandbytes",
    "read_nadam",
    "read_radam",
    "read_rmsprop",
    "read_sparse_adam",
    "rectified",
]

_BLOCK = 256
"""Entries of a state of bitsandbytes that share one scale."""


def averaged(step: Step) -> tuple[float, float, float]:
    """Return the momentum of an exponential average with the first of ``betas``."""
    beta = float(step.group["betas"][0])
    return beta, beta, 1.0


def decayed_apart(step: Step) -> float:
    """Return eta lambda, for weight decay that is always decoupled."""
    return float(step.group["lr"]) * float(step.group["weight_decay"])


def decoupled_shrink(step: Step) -> float:
    """Return eta lambda if the weight decay is decoupled, else 0."""
    return decayed_apart(step) if step.group.get("decoupled_weight_decay", False) else 0.0


def coupled_decay(group: Group) -> float:
    """Return lambda if the weight decay is a part of the gradient, else 0."""
    decoupled = group.get("decoupled_weight_decay", False)
    return 0.0 if decoupled else float(group["weight_decay"])


def adam_entries(step: Step, second: Tensor) -> Tensor:
    """Return the inverse of Adam's denominator with bias corrections, ``second`` its second moment."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"][:2])
    root = second.sqrt() / (1 - beta2**step.steps) ** 0.5
    denominator: Tensor = (root + step.group["eps"]) * (1 - beta1**step.steps)
    return denominator.reciprocal()


def _second_moment(step: Step) -> Tensor:
    second: Tensor = step.state[
        "max_exp_avg_sq" if step.group.get("amsgrad", False) else "exp_avg_sq"
    ]
    # torchao keeps it as a tensor subclass of 8, 4 or fp8 bits.
    return second.dequantize() if hasattr(second, "codes") else second


def read_adam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Adam`` and ``AdamW``, and those of ``torchao``."""
    # In older versions of torch the groups of AdamW do not say that its decay is decoupled.
    always = isinstance(optimizer, torch.optim.AdamW) or getattr(optimizer, "is_adamw", False)
    return diagonal_rule(
        optimizer,
        lambda step: adam_entries(step, _second_moment(step)),
        momentum=averaged,
        shrink=decayed_apart if always else decoupled_shrink,
        weight_decay=lambda group: 0.0 if always else coupled_decay(group),
    )


def late_eps_entries(step: Step, second: Tensor, factor: float = 1.0) -> Tensor:
    """Return Adam's entries where eps joins the second moment before its bias correction."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"])
    corrections = (1 - beta2**step.steps) ** 0.5 / (1 - beta1**step.steps)
    entry: Tensor = factor * corrections / (second.sqrt() + step.group["eps"])
    return entry


def read_sparse_adam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.SparseAdam``: exact if gradients touch every row in each step."""
    return diagonal_rule(
        optimizer,
        lambda step: late_eps_entries(step, step.state["exp_avg_sq"]),
        momentum=averaged,
        weight_decay=lambda group: 0.0,
    )


def read_bitsandbytes(optimizer: Any) -> UpdateRule:
    """Read ``bitsandbytes``' Adam and AdamW of 8 or 32 bits, paged or not; both decouple their decay."""
    if optimizer.optimizer_name != "adam":
        reason = f"{type(optimizer).__name__} of bitsandbytes is not read: only Adam and AdamW are"
        return UpdateRule.unknown_step(optimizer, reason)

    def entries(step: Step) -> Tensor:
        second: Tensor = step.state["state2"]
        if second.dtype == torch.uint8:
            values = step.state["qmap2"][second.flatten().int()]
            scales = step.state["absmax2"].repeat_interleave(_BLOCK)[: values.numel()]
            second = (values * scales).view_as(second)
        return adam_entries(step, second)

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=decayed_apart,
        weight_decay=lambda group: 0.0,
    )


def rectified(step: Step, threshold: float) -> float | None:
    """Return RAdam's rectification r, or ``None`` while the second moment is not reliable.

    It is not while the length of its average is up to ``threshold``.
    """
    beta2 = float(step.group["betas"][1])
    far = 2 / (1 - beta2) - 1
    rho = far - 2 * step.steps * beta2**step.steps / (1 - beta2**step.steps)
    if rho <= threshold:
        return None
    return float(((rho - 4) * (rho - 2) * far / ((far - 4) * (far - 2) * rho)) ** 0.5)


def read_radam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.RAdam``: Adam times the rectification, or the average of gradients alone."""

    def entries(step: Step) -> Tensor:
        factor, second = rectified(step, 5.0), step.state["exp_avg_sq"]
        if factor is not None:
            return late_eps_entries(step, second, factor)
        beta1 = float(step.group["betas"][0])
        return torch.full_like(second, 1 / (1 - beta1**step.steps))

    return diagonal_rule(
        optimizer, entries, momentum=averaged, shrink=decoupled_shrink, weight_decay=coupled_decay
    )


def read_adamax(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Adamax``, whose largest gradients already include ``eps``."""

    def entries(step: Step) -> Tensor:
        beta = float(step.group["betas"][0])
        denominator: Tensor = step.state["exp_inf"] * (1 - beta**step.steps)
        return denominator.reciprocal()

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adadelta(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read ``torch.optim.Adadelta``: :math:`P = \sqrt{(\Delta+\epsilon)/(v+\epsilon)}`.

    The step uses the average :math:`\Delta` before it adds its own square, which follows from the
    gradient while that is there; later, :math:`\Delta` after the step is taken.
    """

    def entries(step: Step) -> Tensor:
        group, state, rho = step.group, step.state, float(step.group["rho"])
        below, deltas = state["square_avg"] + group["eps"], state["acc_delta"]
        if step.param is not None and step.param.grad is not None:
            sign = -1.0 if group["maximize"] else 1.0
            g = sign * real_view(step.param.grad) + group["weight_decay"] * real_view(step.param)
            own = (1 - rho) * g.square() / below
            deltas = (deltas - own * group["eps"]) / (rho + own)
        entry: Tensor = ((deltas + group["eps"]) / below).sqrt()
        return entry

    return diagonal_rule(optimizer, entries)


def _nadam_weights(step: Step) -> tuple[float, float]:
    """Return A and B of NAdam's step along A g + B m."""
    group, state, t = step[:3]
    beta, decay = float(group["betas"][0]), float(group["momentum_decay"])
    mu, following = (beta * (1 - 0.5 * 0.96 ** (count * decay)) for count in (t, t + 1))
    # The product so far; before the first step, that after it.
    product = float(state.get("mu_product", mu))
    return (1 - mu) / (1 - product), following / (1 - product * following)


def read_nadam(optimizer: torch.optim.NAdam) -> UpdateRule:
    r"""Read ``torch.optim.NAdam``.

    The step is along :math:`\frac{1-\mu_t}{1-\Pi_t}g + \frac{\mu_{t+1}}{1-\Pi_{t+1}}m` with
    :math:`\mu_t=\beta_1(1-0.96^{t\psi}/2)` and :math:`\Pi_t=\mu_1\cdots\mu_t`: the momentum share is
    :math:`\nu = B/(A+B)`, and the preconditioner includes A + B. :math:`\mu_t` tends to :math:`\beta_1`,
    and the limit to that of Nesterov's momentum with the rate :math:`(1-\beta_1)\eta`.
    """

    def entries(step: Step) -> Tensor:
        group, state, t = step[:3]
        root = (state["exp_avg_sq"] / (1 - float(group["betas"][1]) ** t)).sqrt()
        inverse: Tensor = (root + group["eps"]).reciprocal()
        return inverse * sum(_nadam_weights(step))

    def momentum(step: Step) -> tuple[float, float, float]:
        beta, tau, _ = averaged(step)
        now, mean = _nadam_weights(step)
        return beta, tau, mean / (now + mean)

    return diagonal_rule(
        optimizer, entries, momentum=momentum, shrink=decoupled_shrink, weight_decay=coupled_decay
    )


def read_rmsprop(optimizer: torch.optim.RMSprop) -> UpdateRule:
    """Read ``torch.optim.RMSprop``, with or without ``centered`` and momentum."""

    def entries(step: Step) -> Tensor:
        group, state, _ = step[:3]
        second: Tensor = state["square_avg"]
        if group["centered"]:
            second = second.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
        denominator: Tensor = second.sqrt() + group["eps"]
        return denominator.reciprocal()

    return diagonal_rule(
        optimizer, entries, momentum=lambda step: (float(step.group["momentum"]), 0.0, 1.0)
    )


def read_adagrad(optimizer: torch.optim.Adagrad) -> UpdateRule:
    """Read ``torch.optim.Adagrad``, with the learning rate after ``lr_decay``."""

    def entries(step: Step) -> Tensor:
        denominator: Tensor = step.state["sum"].sqrt() + step.group["eps"]
        return denominator.reciprocal()

    def rate(step: Step) -> float:
        return float(step.group["lr"]) / (1 + (step.steps - 1) * float(step.group["lr_decay"]))

    return diagonal_rule(optimizer, entries, rate=rate)
