"""Readers of the optimizers of ``torch_optimizer`` (0.3.0) with a diagonal preconditioner, and QHM.

They follow the code of its classes, and do not import the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stableopt.stability.rules.readers.adaptive import averaged, decayed_apart, late_eps_entries
from stableopt.stability.rules.readers.diagonal import Group, Step, diagonal_rule
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = [
    "read_adabelief",
    "read_adabound",
    "read_adahessian",
    "read_adamod",
    "read_apollo",
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


def _corrected(step: Step, root: Tensor, power: float = 1.0) -> Tensor:
    """Return the inverse of Adam's denominator with bias corrections, ``root`` to ``power``."""
    beta1, beta2 = (float(beta) for beta in step.group["betas"])
    scaled = root**power / (1 - beta2**step.steps) ** (power / 2)
    denominator: Tensor = (scaled + step.group["eps"]) * (1 - beta1**step.steps)
    return denominator.reciprocal()
