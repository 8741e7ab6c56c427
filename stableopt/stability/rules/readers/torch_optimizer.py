"""Readers of the optimizers of ``torch_optimizer`` (0.3.0) with a filter or a diagonal preconditioner.

The readers follow the code of the classes, without importing the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.filters import Filter
from stableopt.stability.rules.readers.adafactor import without_gradients
from stableopt.stability.rules.readers.adaptive import averaged, late_eps_entries, rectified
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.readers.sgd import read_sgd
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "read_accsgd",
    "read_adabelief",
    "read_adabound",
    "read_adahessian",
    "read_adamod",
    "read_apollo",
    "read_pid",
    "read_qhadam",
    "read_qhm",
    "read_yogi",
]


def read_yogi(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read Yogi: Adam with another second moment."""

    def entries(step: Step) -> Tensor:
        return _corrected_inverse(step, step.state["exp_avg_sq"].sqrt())

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adahessian(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read Adahessian: Adam with squared Hessian diagonals, to the power ``hessian_power`` / 2.

    Its weight decay is decoupled, contrary to its documentation.
    """

    def entries(step: Step) -> Tensor:
        root: Tensor = step.state["exp_hessian_diag_sq"].sqrt()
        return _corrected_inverse(step, root, power=float(step.group["hessian_power"]))

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        decoupled=True,
    )


def read_adabelief(optimizer: Any) -> UpdateRule:
    """Read AdaBelief, with ``amsgrad``, ``weight_decouple``, ``fixed_decay`` and ``rectify``.

    Its stored variance already includes ``eps``. With ``rectify``, P = 1 without bias correction while
    the variance is unreliable.
    """
    decoupled = bool(optimizer._weight_decouple)

    def entries(step: Step) -> Tensor:
        key = "max_exp_avg_var" if step.group["amsgrad"] else "exp_avg_var"
        variance: Tensor = step.state[key]
        factor: float | None = 1.0
        if optimizer._rectify:
            # The optimizer keeps this length from its first step, though betas may change.
            factor = rectified(step, 4.0, float(step.state["rho_inf"]))
        if factor is None:
            return torch.ones_like(variance)
        return _corrected_inverse(step, variance.sqrt()) * factor

    def shrink(step: Step) -> float:
        decay = float(step.group["weight_decay"]) if decoupled else 0.0
        return decay if optimizer._fixed_decay else decay * float(step.group["lr"])

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        decoupled=decoupled,
        shrink=shrink,
    )


def read_apollo(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read Apollo: :math:`P = 1/\max(|B|, 1)`, where B is its estimate of the Hessian's diagonal.

    Its average of gradients gives the newest the weight :math:`\alpha_t = (1-\beta)/(1-\beta^t)`, so
    the momentum is :math:`1-\alpha_t`. The learning rate has a linear warm-up.
    """

    def entries(step: Step) -> Tensor:
        diagonal: Tensor = step.state["approx_hessian"]
        return diagonal.abs().clamp(min=1).reciprocal()

    def momentum(step: Step) -> tuple[float, float, float]:
        beta = float(step.group["beta"])
        momentum_t = 1 - (1 - beta) / (1 - beta**step.steps)
        return momentum_t, momentum_t, 1.0

    def rate(step: Step) -> float:
        group, previous_steps = step.group, step.steps - 1
        if previous_steps >= group["warmup"]:
            return float(group["lr"])
        increase = (group["base_lr"] - group["init_lr"]) * previous_steps / group["warmup"]
        return float(increase + group["init_lr"])

    return diagonal_rule(optimizer, entries, momentum=momentum, rate=rate)


def read_adabound(optimizer: Any) -> UpdateRule:
    """Read AdaBound: Adam's entries, clamped to bounds that converge to a final learning rate."""
    final_ratios = {
        id(p): float(group["final_lr"]) / base
        for group, base in zip(optimizer.param_groups, optimizer.base_lrs, strict=True)
        for p in group["params"]
    }

    def entries(step: Step) -> Tensor:
        second = step.state["max_exp_avg_sq" if step.group["amsbound"] else "exp_avg_sq"]
        final, progress = final_ratios[id(step.param)], float(step.group["gamma"]) * step.steps
        low, high = final * (1 - 1 / (progress + 1)), final * (1 + 1 / progress)
        return late_eps_entries(step, second).clamp(low, high)

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adamod(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read AdaMod: Adam's entries, at most their running average; weight decay is decoupled."""

    def entries(step: Step) -> Tensor:
        lr = float(step.group["lr"])
        adam = late_eps_entries(step, step.state["exp_avg_sq"])
        return adam.minimum(step.state["exp_avg_lr"] / lr) if lr else adam

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        decoupled=True,
    )


def read_qhm(optimizer: Any) -> UpdateRule:
    """Read QHM (Ma & Yarats, 2019): a share nu of an average of gradients."""

    def decoupled(group: Group) -> bool:
        return bool(group["weight_decay_type"] != optimizer.GRAD)

    def momentum(step: Step) -> tuple[float, float, float]:
        beta = float(step.group["momentum"])
        return beta, beta, float(step.group["nu"])

    return diagonal_rule(
        optimizer,
        lambda step: torch.ones_like(step.state["momentum_buffer"]),
        momentum=momentum,
        decoupled=decoupled,
    )


def read_qhadam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read QHAdam (Ma & Yarats, 2019): shares of the averages of gradients and of their squares.

    With a share of the squares below 1 the denominator needs the gradient of the step.
    """
    if any(float(group["nus"][1]) != 1 for group in optimizer.param_groups):
        unknown = without_gradients(optimizer)
        if unknown is not None:
            return unknown

    def entries(step: Step) -> Tensor:
        share = float(step.group["nus"][1])
        second = share * step.state["exp_avg_sq"]
        if share != 1 and step.param is not None and step.param.grad is not None:
            # The gradient includes weight decay: the optimizer adds it in place.
            second += (1 - share) * step.param.grad.square()
        denominator: Tensor = second.sqrt() + step.group["eps"]
        return denominator.reciprocal()

    def momentum(step: Step) -> tuple[float, float, float]:
        beta1 = 1 - 1 / step.state["beta1_weight"] if step.state else 0.0
        return beta1, beta1, float(step.group["nus"][0])

    def decoupled(group: Group) -> bool:
        return bool(group["decouple_weight_decay"])

    return diagonal_rule(
        optimizer,
        entries,
        momentum=momentum,
        decoupled=decoupled,
    )


def _filter_rule(
    optimizer: torch.optim.Optimizer, key: str, filter: Callable[[Step], Filter]
) -> UpdateRule:
    """Return the rule of a filter with P = 1; ``key`` is an entry of the state."""
    return diagonal_rule(optimizer, lambda step: torch.ones_like(step.state[key]), filter=filter)


def read_pid(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read PID (An et al., 2018): the gradient, its running sum, and an average of its differences."""

    def filter(step: Step) -> Filter:
        group, beta = step.group, float(step.group["momentum"])
        integral = float(group["integral"]) * (1 - float(group["dampening"]))
        derivative = float(group["derivative"]) * (1 - beta)
        return (1 + integral + derivative, -beta - derivative), (1.0, -beta)

    if not any(group["momentum"] for group in optimizer.param_groups):
        return read_sgd(optimizer)
    return _filter_rule(optimizer, "i_buffer", filter)


def read_accsgd(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read AccSGD (Kidambi et al., 2018), whose buffer b is a second copy of the parameters.

    With long step L, mixing weight :math:`\beta` and share :math:`\zeta`,
    :math:`b'=(1-\beta)b+\beta(\theta-Lg)` and :math:`\theta'=\zeta(\theta-\eta g)+(1-\zeta)b'`. This is
    a filter with the pole :math:`\zeta(1-\beta)`.
    """

    def filter(step: Step) -> Filter:
        group, lr, small = step.group, float(step.group["lr"]), float(step.group["small_const"])
        if not lr:
            return (1.0,), (1.0,)
        long = float(group["kappa"]) / small  # relative to the learning rate
        beta = small**2 * float(group["xi"]) / float(group["kappa"])
        zeta = small / (small + beta)
        newest = zeta + (1 - zeta) * beta * long
        previous = (1 - beta) * (newest - (1 - zeta) * beta * long)
        return (newest, -previous), (1.0, -zeta * (1 - beta))

    return _filter_rule(optimizer, "momentum_buffer", filter)


def _corrected_inverse(step: Step, root: Tensor, power: float = 1.0) -> Tensor:
    """Return the inverse of Adam's denominator with bias corrections, for ``root`` to the ``power``."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"])
    scaled = root**power / (1 - beta2**step.steps) ** (power / 2)
    denominator: Tensor = (scaled + step.group["eps"]) * (1 - beta1**step.steps)
    return denominator.reciprocal()
