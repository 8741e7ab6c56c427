r"""Readers of ``torch.optim``'s adaptive optimizers: Adam, AdamW, NAdam, RMSprop and Adagrad.

The preconditioner includes bias corrections, as in Cohen et al., *Adaptive gradient methods at the
edge of stability* (2022): Adam's is

.. math::
    P_t = \mathrm{diag}\left[(1-\beta_1^t)\left(\sqrt{v_t/(1-\beta_2^t)}+\epsilon\right)\right]^{-1},

so its limit is :math:`(2+2\beta_1)/((1-\beta_1)\eta)` from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "averaged",
    "coupled_decay",
    "decoupled_shrink",
    "read_adagrad",
    "read_adam",
    "read_nadam",
    "read_rmsprop",
]


def averaged(step: Step) -> tuple[float, float, float]:
    """Return the momentum of an exponential average with the first of ``betas``."""
    beta = float(step.group["betas"][0])
    return beta, beta, 1.0


def decoupled_shrink(group: Group) -> float:
    """Return eta lambda if the weight decay is decoupled, else 0."""
    decoupled = group.get("decoupled_weight_decay", False)
    return float(group["lr"]) * float(group["weight_decay"]) if decoupled else 0.0


def coupled_decay(group: Group) -> float:
    """Return lambda if the weight decay is a part of the gradient, else 0."""
    decoupled = group.get("decoupled_weight_decay", False)
    return 0.0 if decoupled else float(group["weight_decay"])


def read_adam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``torch.optim.Adam`` and ``AdamW``, with or without ``amsgrad``."""
    # In older versions of torch the groups of AdamW do not say that its decay is decoupled.
    always = isinstance(optimizer, torch.optim.AdamW)

    def entries(step: Step) -> Tensor:
        group, state, t = step
        beta1, beta2 = (float(beta) for beta in group["betas"])
        second: Tensor = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        root = second.sqrt() / (1 - beta2**t) ** 0.5
        denominator: Tensor = (root + group["eps"]) * (1 - beta1**t)
        return denominator.reciprocal()

    def complete(group: Group) -> Group:
        return {**group, "decoupled_weight_decay": True} if always else group

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=lambda group: decoupled_shrink(complete(group)),
        weight_decay=lambda group: coupled_decay(complete(group)),
    )


def _nadam_weights(step: Step) -> tuple[float, float]:
    """Return A and B of NAdam's step along A g + B m."""
    group, state, t = step
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
        group, state, t = step
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
        group, state, _ = step
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

    return diagonal_rule(optimizer, entries, momentum=lambda step: (0.0, 0.0, 1.0), rate=rate)
