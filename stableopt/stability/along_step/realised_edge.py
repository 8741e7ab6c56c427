r"""The realised edge: how much of the predicted descent the step just taken lost to curvature.

.. math::
    \zeta = 1 - \frac{\Delta L}{g^\top\delta} = -\frac{\delta^\top\bar H\delta}{2\,g^\top\delta},

with the step :math:`\delta`, the probe gradient g before it, the change :math:`\Delta L` of the probe
loss, and the Hessian :math:`\bar H` averaged over the step (Lee & Lee, *The Road Taken*, 2026). It is
one minus the gain ratio of trust-region methods. For any optimizer, the step raised the probe loss if
it is above 1. Gradient descent on an eigenvector has :math:`\eta\lambda/2`.

A step of a mini-batch is noise for the most part. Numerator and denominator are then averaged apart over
a window of measured steps. Where :math:`\Delta L` is rounding, its second-order part is the difference
of two gradients, :math:`\tfrac12(g_+-g)^\top\delta = \tfrac12\delta^\top\bar H\delta` up to the
cubic term: a product with the Hessian over the step that needs no second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.taken_step import AlongStep

__all__ = ["loss_rounding", "realised_edge"]

WINDOW = 32
"""Measured steps in an average with mini-batches; with full batches, one."""

_ROUNDINGS = 1000
"""Rounding errors of the loss that its change must exceed: 1e-4 of the loss in single precision."""

_LEAST_LOSS = 0.01
"""A smaller loss is rounded like one of this size: a cross entropy is a difference of logits."""

_FIELDS = ("realised_edge", "realised_edge_uphill")


def realised_edge(at: Evaluation) -> QuantityResult:
    """Measure the realised edge of the step just taken, or its average over the window."""
    along = at.along_step()
    if not along.moved:
        return QuantityResult()
    slope = along.slope  # first, since the loss before the step comes with it
    fall, error = _fall(along)
    if not math.isfinite(fall) or not math.isfinite(slope):
        raise NonFiniteError(f"the loss along the step changes by {fall}, its slope is {slope}")
    rows, uphill = (at.memory.setdefault(name, []) for name in _FIELDS)
    rows.append([fall, slope, _metric(at, along)])
    uphill[:] = [(uphill[0] if uphill else 0) + (slope >= 0)]
    del rows[: -_window(at)]
    return _averaged(rows, error, uphill=uphill[0])


def _fall(along: AlongStep) -> tuple[float, float]:
    """Return the change of the loss over the step, and its rounding error."""
    change = along.loss_after - along.loss_before
    rounding = loss_rounding(along.problem, along.loss_before, along.loss_after)
    if not math.isfinite(change) or abs(change) >= _ROUNDINGS * rounding:
        return change, rounding
    half = (along.slope_after - along.slope) / 2
    return along.slope + half, _eps(along.problem) * abs(along.slope)


def loss_rounding(problem: MeanLoss, *losses: float) -> float:
    """Return the rounding error of losses of this size."""
    return _eps(problem) * max(_LEAST_LOSS, *map(abs, losses))


def _eps(problem: MeanLoss) -> float:
    return torch.finfo(problem.precision.autocast or problem.dtype).eps


def _metric(at: Evaluation, along: AlongStep) -> float:
    r"""Return :math:`k\,\delta^\top P^{-1}\delta` with the limit k; not a number if unknown."""
    rule = at.rule
    if rule is None or rule.unknown is not None or at.preconditioner is not None:
        return math.nan
    return rule.max_sharpness * at.squared_length(along)


def _window(at: Evaluation) -> int:
    if at.window is not None:
        return at.window
    whole = at.batch_size is not None and at.batch_size == at.dataset_size
    return 1 if whole or (at.rule is not None and at.rule.full_batch) else WINDOW


def _averaged(rows: list[list[Any]], error: float, *, uphill: float) -> QuantityResult:
    """Return the ratio of averages over ``rows`` of (change, slope, metric)."""
    falls, slopes, metrics = (math.fsum(column) for column in zip(*rows, strict=True))
    details = {"steps": float(len(rows)), "uphill": float(uphill)}
    if not slopes < 0:
        return QuantityResult(details=details)
    ratio = falls / slopes
    value = 1 - ratio
    spread = abs(error / slopes)
    if len(rows) > 1:
        # Of a ratio of averages, to first order in the deviations of the steps from it.
        squares = math.fsum((fall - ratio * slope) ** 2 for fall, slope, _ in rows)
        spread = math.sqrt(squares * len(rows) / (len(rows) - 1)) / abs(slopes)
    details["standard_error"] = spread
    if math.isfinite(metrics) and metrics > 0:
        details["calibration"] = -2 * slopes / metrics
    relative = spread / abs(value) if value else 0.0
    # An average has a standard error, and no tolerance to reach.
    measurement = Measurement(value, relative, len(rows), 0.0, True)
    return QuantityResult(value=value, measurement=measurement, details=details)
