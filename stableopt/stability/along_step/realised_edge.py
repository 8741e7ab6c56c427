r"""The realised edge: the share of the predicted descent that the last step lost to curvature.

.. math::
    \zeta = 1 - \frac{\Delta L}{g^\top\delta} = -\frac{\delta^\top\bar H\delta}{2\,g^\top\delta},

with the step :math:`\delta`, the probe gradient g before it, the change :math:`\Delta L` of the probe
loss, and the Hessian :math:`\bar H` averaged over the step (Lee & Lee, *The Road Taken*, 2026). It is
one minus the gain ratio of trust-region methods. For any optimizer, a value above 1 means that the step
raised the probe loss. Gradient descent along an eigenvector has :math:`\zeta = \eta\lambda/2`.

Mini-batch steps are mostly noise: numerator and denominator are then averaged separately over a window
of measured steps. If :math:`\Delta L` is below rounding, two gradients give its second-order part,
:math:`\tfrac12(g_+-g)^\top\delta = \tfrac12\delta^\top\bar H\delta` up to the cubic term, without a
second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.problem.derivatives.short_differences import LEAST_LOSS
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.taken_step import AlongStep

__all__ = ["loss_rounding", "realised_edge"]

WINDOW = 32
"""Measured steps in an average with mini-batches; one with full batches."""

_ROUNDINGS = 1000
"""The change of the loss must exceed so many rounding errors, 1e-4 of the loss in single precision."""

_FIELDS = ("realised_edge", "realised_edge_uphill")


def realised_edge(evaluation: Evaluation) -> QuantityResult:
    """Measure the realised edge of the step just taken, or its average over the window."""
    along = evaluation.along_step()
    if not along.moved:
        return QuantityResult()
    slope = along.slope  # first: its gradient also computes the loss before the step
    change, error = _loss_change(along)
    if not math.isfinite(change) or not math.isfinite(slope):
        raise NonFiniteError(f"the loss along the step changes by {change}, its slope is {slope}")
    rows, uphill = (evaluation.memory.setdefault(name, []) for name in _FIELDS)
    rows.append([change, slope, _scaled_length(evaluation, along)])
    uphill[:] = [(uphill[0] if uphill else 0) + (slope >= 0)]
    del rows[: -_window(evaluation)]
    return _averaged(rows, error, uphill=uphill[0])


def _loss_change(along: AlongStep) -> tuple[float, float]:
    """Return the change of the loss over the step, and its rounding error."""
    change = along.loss_after - along.loss_before
    rounding = loss_rounding(along.problem, along.loss_before, along.loss_after)
    if not math.isfinite(change) or abs(change) >= _ROUNDINGS * rounding:
        return change, rounding
    second_order = (along.slope_after - along.slope) / 2
    return along.slope + second_order, _eps(along.problem) * abs(along.slope)


def loss_rounding(problem: MeanLoss, *losses: float) -> float:
    """Return the rounding error of losses of this size."""
    return _eps(problem) * max(LEAST_LOSS, *map(abs, losses))


def _eps(problem: MeanLoss) -> float:
    return torch.finfo(problem.precision.autocast or problem.dtype).eps


def _scaled_length(evaluation: Evaluation, along: AlongStep) -> float:
    r"""Return :math:`k\,\delta^\top P^{-1}\delta` with the limit k; NaN if it is not known."""
    rule = evaluation.rule
    if rule is None or rule.unknown is not None or evaluation.preconditioner is not None:
        return math.nan
    return rule.max_sharpness * evaluation.squared_length(along)


def _window(evaluation: Evaluation) -> int:
    if evaluation.window is not None:
        return evaluation.window
    size, rule = evaluation.batch_size, evaluation.rule
    full_batch = size is not None and size == evaluation.dataset_size
    return 1 if full_batch or (rule is not None and rule.full_batch) else WINDOW


def _averaged(rows: list[list[Any]], error: float, *, uphill: float) -> QuantityResult:
    """Return one minus the ratio of averages, from ``rows`` of change, slope and scaled length."""
    changes, slopes, lengths = (math.fsum(column) for column in zip(*rows, strict=True))
    details = {"steps": float(len(rows)), "uphill": float(uphill)}
    if not slopes < 0:
        return QuantityResult(details=details)
    ratio = changes / slopes
    value = 1 - ratio
    standard_error = abs(error / slopes)
    if len(rows) > 1:
        # The delta method: to first order in the deviations of the steps from the ratio.
        squares = math.fsum((change - ratio * slope) ** 2 for change, slope, _ in rows)
        standard_error = math.sqrt(squares * len(rows) / (len(rows) - 1)) / abs(slopes)
    details["standard_error"] = standard_error
    if math.isfinite(lengths) and lengths > 0:
        details["calibration"] = -2 * slopes / lengths
    measurement = Measurement.of_average(value, standard_error, len(rows))
    return QuantityResult(value=value, measurement=measurement, details=details)
