"""Readers of the optimizers of ``torch_optimizer`` (0.3.0) with a filter or a diagonal preconditioner.

They follow the code of its classes, and do not import the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.filters import Filter
from stableopt.stability.rules.readers.adafactor import without_gradients
from stableopt.stability.rules.readers.adaptive import averaged, decayed_apart, late_eps_entries
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
        return _corrected(step, step.state["exp_avg_sq"].sqrt())

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adahessian(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read Adahessian: Adam with squared Hessian diagonals, to the power ``hessian_power`` / 2.

    Its weight decay is decoupled, unlike its documentation says.
    """

    def entries(step: Step) -> Tensor:
        root: Tensor = step.state["exp_hessian_diag_sq"].sqrt()
        return _corrected(step, root, power=float(step.group["hessian_power"]))

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=decayed_apart,
        weight_decay=lambda group: 0.0,
    )


def read_adabelief(optimizer: Any) -> UpdateRule:
    """Read AdaBelief, with ``amsgrad``, ``weight_decouple``, ``fixed_decay`` and ``rectify``.

    Its stored variance already includes ``eps``. A rectified step whose variance is not yet reliable
    has neither preconditioner nor bias correction.
    """
    decoupled = bool(optimizer._weight_decouple)

    def entries(step: Step) -> Tensor:
        group, state, t = step[:3]
        variance: Tensor = state["max_exp_avg_var" if group["amsgrad"] else "exp_avg_var"]
        factor = 1.0
        if optimizer._rectify:
            beta2, far = float(group["betas"][1]), float(state["rho_inf"])
            rho = far - 2 * t * beta2**t / (1 - beta2**t)
            if rho <= 4:
                return torch.ones_like(variance)
            factor = (rho - 4) * (rho - 2) * far / ((far - 4) * (far - 2) * rho)
        return _corrected(step, variance.sqrt()) * float(factor**0.5)

    def shrink(step: Step) -> float:
        taken = float(step.group["weight_decay"]) if decoupled else 0.0
        return taken if optimizer._fixed_decay else taken * float(step.group["lr"])

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=shrink,
        weight_decay=lambda group: 0.0 if decoupled else float(group["weight_decay"]),
    )


def read_apollo(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read Apollo: :math:`P = 1/\max(|B|, 1)`, B its diagonal of the Hessian.

    Its average of gradients weights the newest by :math:`\alpha_t = (1-\beta)/(1-\beta^t)`, so its
    momentum is :math:`1-\alpha_t`. The learning rate follows its warm-up.
    """

    def entries(step: Step) -> Tensor:
        diagonal: Tensor = step.state["approx_hessian"]
        return diagonal.abs().clamp(min=1).reciprocal()

    def momentum(step: Step) -> tuple[float, float, float]:
        beta = float(step.group["beta"])
        past = 1 - (1 - beta) / (1 - beta**step.steps)
        return past, past, 1.0

    def rate(step: Step) -> float:
        group, done = step.group, step.steps - 1
        if done >= group["warmup"]:
            return float(group["lr"])
        return float(
            (group["base_lr"] - group["init_lr"]) * done / group["warmup"] + group["init_lr"]
        )

    return diagonal_rule(optimizer, entries, momentum=momentum, rate=rate)


def read_adabound(optimizer: Any) -> UpdateRule:
    """Read AdaBound: Adam's entries between bounds that tend to a final learning rate."""
    finals = {
        id(p): float(group["final_lr"]) / base
        for group, base in zip(optimizer.param_groups, optimizer.base_lrs, strict=True)
        for p in group["params"]
    }

    def entries(step: Step) -> Tensor:
        second = step.state["max_exp_avg_sq" if step.group["amsbound"] else "exp_avg_sq"]
        final, near = finals[id(step.param)], float(step.group["gamma"]) * step.steps
        return late_eps_entries(step, second).clamp(
            final * (1 - 1 / (near + 1)), final * (1 + 1 / near)
        )

    return diagonal_rule(optimizer, entries, momentum=averaged)


def read_adamod(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read AdaMod: Adam's entries, at most their average so far; its decay is decoupled."""

    def entries(step: Step) -> Tensor:
        lr = float(step.group["lr"])
        own = late_eps_entries(step, step.state["exp_avg_sq"])
        return own.minimum(step.state["exp_avg_lr"] / lr) if lr else own

    return diagonal_rule(
        optimizer,
        entries,
        momentum=averaged,
        shrink=decayed_apart,
        weight_decay=lambda group: 0.0,
    )


def read_qhm(optimizer: Any) -> UpdateRule:
    """Read QHM (Ma & Yarats, 2019): a share nu of an average of gradients."""

    def apart(group: Group) -> bool:
        return bool(group["weight_decay_type"] != optimizer.GRAD)

    return diagonal_rule(
        optimizer,
        lambda step: torch.ones_like(step.state["momentum_buffer"]),
        momentum=lambda step: (*(float(step.group["momentum"]),) * 2, float(step.group["nu"])),
        shrink=lambda step: decayed_apart(step) if apart(step.group) else 0.0,
        weight_decay=lambda group: 0.0 if apart(group) else float(group["weight_decay"]),
    )


def read_qhadam(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read QHAdam (Ma & Yarats, 2019): shares of the averages of gradients and of their squares.

    With a second share below 1 the denominator needs the gradient of the step.
    """
    if any(float(group["nus"][1]) != 1 for group in optimizer.param_groups):
        unknown = without_gradients(optimizer)
        if unknown is not None:
            return unknown

    def entries(step: Step) -> Tensor:
        share = float(step.group["nus"][1])
        second = share * step.state["exp_avg_sq"]
        if share != 1 and step.param is not None and step.param.grad is not None:
            # The optimizer has added its weight decay to the gradient in place.
            second += (1 - share) * step.param.grad.square()
        denominator: Tensor = second.sqrt() + step.group["eps"]
        return denominator.reciprocal()

    def momentum(step: Step) -> tuple[float, float, float]:
        past = 1 - 1 / step.state["beta1_weight"] if step.state else 0.0
        return past, past, float(step.group["nus"][0])

    def apart(group: Group) -> bool:
        return bool(group["decouple_weight_decay"])

    return diagonal_rule(
        optimizer,
        entries,
        momentum=momentum,
        shrink=lambda step: decayed_apart(step) if apart(step.group) else 0.0,
        weight_decay=lambda group: 0.0 if apart(group) else float(group["weight_decay"]),
    )


def _filtered(
    optimizer: torch.optim.Optimizer, key: str, averages: Callable[[Step], Filter]
) -> UpdateRule:
    """Return the rule of a filter with P = 1; ``key`` is an entry of the state."""
    return diagonal_rule(optimizer, lambda step: torch.ones_like(step.state[key]), filter=averages)


def read_pid(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read PID (An et al., 2018): the gradient, its running sum, and an average of its differences."""

    def averages(step: Step) -> Filter:
        group, beta = step.group, float(step.group["momentum"])
        integral = float(group["integral"]) * (1 - float(group["dampening"]))
        change = float(group["derivative"]) * (1 - beta)
        return (1 + integral + change, -beta - change), (1.0, -beta)

    if not any(group["momentum"] for group in optimizer.param_groups):
        return read_sgd(optimizer)
    return _filtered(optimizer, "i_buffer", averages)


def read_accsgd(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read AccSGD (Kidambi et al., 2018), whose buffer is a second copy of the parameters.

    With long step L, mixing :math:`\beta` and share :math:`\zeta`,
    :math:`b'=(1-\beta)b+\beta(\theta-Lg)` and :math:`\theta'=\zeta(\theta-\eta g)+(1-\zeta)b'`: a
    filter with the pole :math:`\zeta(1-\beta)`.
    """

    def averages(step: Step) -> Filter:
        group, lr, small = step.group, float(step.group["lr"]), float(step.group["small_const"])
        if not lr:
            return (1.0,), (1.0,)
        long = float(group["kappa"]) / small  # relative to the learning rate
        beta = small**2 * float(group["xi"]) / float(group["kappa"])
        zeta = small / (small + beta)
        both = zeta + (1 - zeta) * beta * long
        past = (1 - beta) * (both - (1 - zeta) * beta * long)
        return (both, -past), (1.0, -zeta * (1 - beta))

    return _filtered(optimizer, "momentum_buffer", averages)


def _corrected(step: Step, root: Tensor, power: float = 1.0) -> Tensor:
    """Return the inverse of Adam's denominator with bias corrections, ``root`` to ``power``."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"])
    scaled = root**power / (1 - beta2**step.steps) ** (power / 2)
    denominator: Tensor = (scaled + step.group["eps"]) * (1 - beta1**step.steps)
    return denominator.reciprocal()
