r"""Readers of the adaptive optimizers of ``torch.optim``, and of 8-bit Adam.

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

_DECAY_ROUNDS = 10
"""Rounds that find Adadelta's parameter before a step, to the precision of a float. If decay alone would
turn a parameter's sign, they may end at another solution, and P is off by some percent."""


def averaged(step: Step) -> tuple[float, float, float]:
    """Return the momentum of an exponential average with the first of ``betas``."""
    beta = float(step.group["betas"][0])
    return beta, beta, 1.0


def _decoupled(group: Group) -> bool:
    """Return whether a group of one of torch's optimizers has decoupled weight decay."""
    return bool(group.get("decoupled_weight_decay", False))


def adam_entries(step: Step, second: Tensor) -> Tensor:
    """Return the inverse of Adam's denominator with bias corrections, from the second moment."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"][:2])
    root = second.sqrt() / (1 - beta2**step.steps) ** 0.5
    denominator: Tensor = (root + step.group["eps"]) * (1 - beta1**step.steps)
    return denominator.reciprocal()


def _second_moment(step: Step) -> Tensor:
    key = "max_exp_avg_sq" if step.group.get("amsgrad", False) else "exp_avg_sq"
    second: Tensor = step.state[key]
    # torchao keeps it as a quantised tensor subclass: 8 bits, 4 bits or fp8.
    return second.dequantize() if hasattr(second, "codes") else second


def read_adam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Adam`` and ``AdamW``, and those of ``torchao``."""
    # In older versions of torch the groups of AdamW do not say that its decay is decoupled.
    always = isinstance(optimizer, torch.optim.AdamW) or getattr(optimizer, "is_adamw", False)
    return diagonal_rule(
        optimizer,
        lambda step: adam_entries(step, _second_moment(step)),
        momentum=averaged,
        decoupled=True if always else _decoupled,
    )


def late_eps_entries(step: Step, second: Tensor, factor: float = 1.0) -> Tensor:
    """Return Adam's entries if eps is added to the root before its bias correction."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"])
    corrections = (1 - beta2**step.steps) ** 0.5 / (1 - beta1**step.steps)
    entry: Tensor = factor * corrections / (second.sqrt() + step.group["eps"])
    return entry


def read_sparse_adam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.SparseAdam``: exact if every row has a gradient in each step."""
    return diagonal_rule(
        optimizer,
        lambda step: late_eps_entries(step, step.state["exp_avg_sq"]),
        momentum=averaged,
        weight_decay=lambda group: 0.0,
    )


def read_bitsandbytes(optimizer: Any) -> UpdateRule:
    """Read ``bitsandbytes``' Adam and AdamW of 8 or 32 bits, paged or not; both decouple the decay."""
    if optimizer.optimizer_name != "adam":
        reason = f"bitsandbytes' {type(optimizer).__name__} has no reader: only Adam and AdamW have"
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
        decoupled=True,
    )


def rectified(step: Step, threshold: float, rho_inf: float | None = None) -> float | None:
    """Return RAdam's rectification r, or ``None`` while the second moment is unreliable.

    The second moment is unreliable while its effective averaging length is at most ``threshold``. The
    largest such length is ``rho_inf``, by default that of the present ``betas``.
    """
    beta2 = float(step.group["betas"][1])
    if rho_inf is None:
        rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step.steps * beta2**step.steps / (1 - beta2**step.steps)
    if rho <= threshold:
        return None
    ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return float(ratio**0.5)


def read_radam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.RAdam``: Adam times the rectification, or only the average of gradients."""

    def entries(step: Step) -> Tensor:
        factor, second = rectified(step, 5.0), step.state["exp_avg_sq"]
        if factor is not None:
            return late_eps_entries(step, second, factor)
        beta1 = float(step.group["betas"][0])
        return torch.full_like(second, 1 / (1 - beta1**step.steps))

    return diagonal_rule(optimizer, entries, momentum=averaged, decoupled=_decoupled)


def read_adamax(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Adamax``, whose state ``exp_inf`` already includes ``eps``."""

    def entries(step: Step) -> Tensor:
        beta = float(step.group["betas"][0])
        denominator: Tensor = step.state["exp_inf"] * (1 - beta**step.steps)
        return denominator.reciprocal()

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adadelta(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read ``torch.optim.Adadelta``: :math:`P = \sqrt{(\Delta+\epsilon)/(v+\epsilon)}`.

    The step uses :math:`\Delta` before the update of this average, which is reconstructed from the
    gradient. With weight decay the gradient includes the parameter before the step, which is found by
    iteration. Without a gradient, :math:`\Delta` after the step is used.
    """

    def entries(step: Step) -> Tensor:
        group, state, rho = step.group, step.state, float(step.group["rho"])
        eps, decay = group["eps"], float(group["weight_decay"])
        variance, deltas = state["square_avg"] + eps, state["acc_delta"]
        diagonal: Tensor = ((deltas + eps) / variance).sqrt()
        if step.param is None or step.param.grad is None:
            return diagonal
        gradient = -real_view(step.param.grad) if group["maximize"] else real_view(step.param.grad)
        after = before = real_view(step.param)
        for _ in range(_DECAY_ROUNDS if decay else 1):
            g = gradient + decay * before
            # The step set acc_delta = rho Delta + weight (Delta + eps).
            weight = (1 - rho) * g.square() / variance
            diagonal = (((deltas - weight * eps) / (rho + weight) + eps) / variance).sqrt()
            # With this P the parameter before the step solves a linear equation.
            step_size = float(group["lr"]) * diagonal
            before = (after + step_size * gradient) / (1 - step_size * decay)
        return diagonal

    return diagonal_rule(optimizer, entries)


def _nadam_weights(step: Step) -> tuple[float, float]:
    """Return A and B of NAdam's step along A g + B m."""
    group, state, t = step.group, step.state, step.steps
    beta, decay = float(group["betas"][0]), float(group["momentum_decay"])
    mu, next_mu = (beta * (1 - 0.5 * 0.96 ** (count * decay)) for count in (t, t + 1))
    product = float(state.get("mu_product", mu))  # before any step, that of the first
    return (1 - mu) / (1 - product), next_mu / (1 - product * next_mu)


def read_nadam(optimizer: torch.optim.NAdam) -> UpdateRule:
    r"""Read ``torch.optim.NAdam``.

    The step is along :math:`\frac{1-\mu_t}{1-\Pi_t}g + \frac{\mu_{t+1}}{1-\Pi_{t+1}}m` with
    :math:`\mu_t=\beta_1(1-0.96^{t\psi}/2)` and :math:`\Pi_t=\mu_1\cdots\mu_t`. With these weights A and
    B the momentum share is :math:`\nu = B/(A+B)`, and the preconditioner includes A + B.
    :math:`\mu_t` converges to :math:`\beta_1`, and the limit to that of Nesterov's momentum with the
    learning rate :math:`(1-\beta_1)\eta`.
    """

    def entries(step: Step) -> Tensor:
        beta2 = float(step.group["betas"][1])
        root = (step.state["exp_avg_sq"] / (1 - beta2**step.steps)).sqrt()
        inverse: Tensor = (root + step.group["eps"]).reciprocal()
        return inverse * sum(_nadam_weights(step))

    def momentum(step: Step) -> tuple[float, float, float]:
        beta, tau, _ = averaged(step)
        of_gradient, of_momentum = _nadam_weights(step)
        return beta, tau, of_momentum / (of_gradient + of_momentum)

    return diagonal_rule(optimizer, entries, momentum=momentum, decoupled=_decoupled)


def read_rmsprop(optimizer: torch.optim.RMSprop) -> UpdateRule:
    """Read ``torch.optim.RMSprop``, with or without ``centered`` and momentum."""

    def entries(step: Step) -> Tensor:
        state = step.state
        second: Tensor = state["square_avg"]
        if step.group["centered"]:
            second = second.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
        denominator: Tensor = second.sqrt() + step.group["eps"]
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
