r"""Readers of Adafactor, of ``torch.optim`` and of ``transformers``.

Both multiply the gradient by the inverse root of a second moment, which a matrix parameter keeps as row
and column means R and C only. They then shrink the update to a root mean square of at most d:

.. math:: P = \frac{\alpha}{\eta\kappa}\,\hat V^{-1/2}, \qquad \hat V = \frac{RC}{\mathrm{mean}(R)},
    \qquad \kappa = \max\bigl(1, \mathrm{rms}(\hat V^{-1/2}g)/d\bigr),

where :math:`\alpha` contains the root mean square of the parameters before the step. :math:`\kappa`
needs the gradient of the step, so P is unknown after ``zero_grad``. After the next backward pass
:math:`\kappa` would be wrong without notice; monitors avoid this by reading the rule right after a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stableopt.stability.rules.readers.diagonal import Step, diagonal_rule
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["read_adafactor", "read_transformers_adafactor", "without_gradients"]


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm()) / math.sqrt(tensor.numel())


def without_gradients(optimizer: torch.optim.Optimizer) -> UpdateRule | None:
    """Return an unknown rule if a parameter that has stepped has no gradient, else ``None``."""
    stepped = [
        p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)
    ]
    if all(p.grad is not None for p in stepped):
        return None
    reason = (
        f"{type(optimizer).__name__} scales its update by the gradient, which is gone: measure between"
        " optimizer.step() and zero_grad(), as monitors do"
    )
    return UpdateRule.unknown_step(optimizer, reason)


@torch.no_grad()
def read_adafactor(optimizer: torch.optim.Optimizer) -> UpdateRule:
    r"""Read ``torch.optim.Adafactor``.

    :math:`\alpha = \max(\epsilon_2, \mathrm{rms}(\theta))\,\min(\eta, 1/\sqrt t)`. The root mean square
    before the step is computed from the parameters after it. After a step as large as the parameters,
    such as a first one with a learning rate of 1 or more, the rule is unknown: two sizes are possible.
    """

    def entries(step: Step) -> Tensor:
        group, state, p = step.group, step.state, step.param
        assert p is not None
        assert p.grad is not None
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
        variance = state.get("variance")
        if variance is None:
            rows, columns = state["row_var"], state["col_var"]
            variance = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
        inverse: Tensor = variance.clamp(min=eps1 * eps1).rsqrt()
        update = inverse * (-p.grad if group["maximize"] else p.grad)
        update /= max(1.0, _rms(update) / group["d"])
        kappa = max(1.0, _rms(inverse * p.grad) / group["d"])
        lr = float(group["lr"])
        rate = min(lr, step.steps**-0.5)
        rms_before = _rms_before(p, update, rate, 1 - lr * float(group["weight_decay"]))
        return inverse * (max(eps2, rms_before) * rate / (lr * kappa) if lr else 0.0)

    try:
        return without_gradients(optimizer) or diagonal_rule(optimizer, entries, decoupled=True)
    except _UncertainSizeError:
        reason = (
            "Adafactor took a step as large as a parameter, whose size before it is then not certain:"
            " lower the learning rate, or measure after the next steps"
        )
        return UpdateRule.unknown_step(optimizer, reason)


class _UncertainSizeError(Exception):
    """A parameter before the step may have had two sizes."""


def _rms_before(p: Tensor, update: Tensor, rate: float, kept: float) -> float:
    r"""Solve :math:`x = \mathrm{rms}(\theta)` with :math:`\theta_+ = c\theta - xru` for x.

    Raises:
        _UncertainSizeError: if more than one x may solve it.
    """
    n = p.numel() * kept**2
    # A quadratic equation: coefficient x^2 - 2 along x = square.
    square, along = float(p.square().sum()) / n, rate * float((p * update).sum()) / n
    coefficient = 1 - rate**2 * float(update.square().sum()) / n
    if coefficient <= 0:
        raise _UncertainSizeError
    return (along + math.sqrt(along**2 + coefficient * square)) / coefficient


@torch.no_grad()
def read_transformers_adafactor(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """Read ``transformers.Adafactor``, with or without ``beta1`` and relative steps.

    Its average with ``beta1`` has no bias correction.
    """

    def base_rate(step: Step) -> float:
        group = step.group
        if not group["relative_step"]:
            return float(group["lr"])
        largest = 1e-6 * step.steps if group["warmup_init"] else 1e-2
        return float(min(largest, step.steps**-0.5))

    def parameter_scale(step: Step) -> float:
        """Return the root mean square before the step, by which the base rate is multiplied."""
        if not step.group["scale_parameter"]:
            return 1.0
        return max(float(step.group["eps"][1]), float(step.state.get("RMS", 0.0)))

    def momentum(step: Step) -> tuple[float, float, float]:
        beta = float(step.group["beta1"] or 0.0)
        return beta, beta, 1.0

    def entries(step: Step) -> Tensor:
        state, p = step.state, step.param
        assert p is not None
        assert p.grad is not None
        if "exp_avg_sq" in state:
            inverse = state["exp_avg_sq"].rsqrt()
        else:
            rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            relative_rows = rows / rows.mean(dim=-1, keepdim=True)
            inverse = relative_rows.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
        kappa = max(1.0, _rms(inverse * p.grad) / step.group["clip_threshold"])
        diagonal: Tensor = inverse * (parameter_scale(step) / kappa)
        return diagonal

    def shrink(step: Step) -> float:
        return base_rate(step) * parameter_scale(step) * float(step.group["weight_decay"])

    return without_gradients(optimizer) or diagonal_rule(
        optimizer,
        entries,
        momentum=momentum,
        rate=base_rate,
        decoupled=True,
        shrink=shrink,
    )
