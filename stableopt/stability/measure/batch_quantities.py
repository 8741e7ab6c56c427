"""Measurements of the quantities of mini-batches, with limits that need the measured sharpness."""

from __future__ import annotations

import math

from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.measure.batch_sharpness import (
    BatchSharpness,
    batch_sharpness,
    batch_sharpness_limit,
)
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.largest_batch_sharpness import largest_batch_sharpness
from stableopt.stability.measure.measurement import Measurement, QuantityResult

__all__ = [
    "measured_batch_sharpness",
    "measured_largest_batch_sharpness",
    "measured_mean_batch_sharpness",
]


def measured_batch_sharpness(at: Evaluation) -> QuantityResult:
    """Measure the ratio of means; draws stop at a relative error of ``tol``, and at 64."""
    found = _over_batches(at)
    return _average(at, found.value, found.standard_error)


def measured_mean_batch_sharpness(at: Evaluation) -> QuantityResult:
    """Measure the mean of ratios, over the same batches."""
    found = _over_batches(at)
    return _average(at, found.mean_of_ratios, found.mean_of_ratios_error)


def measured_largest_batch_sharpness(at: Evaluation) -> QuantityResult:
    """Measure the bounds of the sharpest batch."""
    assert at.batch_size is not None
    problem = require_samples(at.problem, "largest_batch_sharpness")
    found = largest_batch_sharpness(
        problem, at.batch_size, tol=at.tol, max_iter=at.max_iter, seed=at.seed
    )
    measurement = Measurement(found.upper, 0.0, found.products, 0.0, math.isfinite(found.upper))
    return QuantityResult.from_measurement(measurement, lower=found.lower)


def _over_batches(at: Evaluation) -> BatchSharpness:
    assert at.batch_size is not None
    if at.over_batches is None:
        problem = require_samples(at.problem, "batch_sharpness")
        at.over_batches = batch_sharpness(problem, at.batch_size, rel_error=at.tol, seed=at.seed)
    return at.over_batches


def _average(at: Evaluation, value: float | None, error: float) -> QuantityResult:
    if value is None:
        return QuantityResult()
    # An average has a standard error, and no tolerance to reach.
    relative = error / abs(value) if value else 0.0
    measurement = Measurement(value, relative, _over_batches(at).batches, 0.0, True)
    return QuantityResult(value, _limit(at), measurement=measurement)


def _limit(at: Evaluation) -> float | None:
    if at.rule is None or at.rule.unknown is not None or not at.rule.noise_known:
        return None
    sharpest = at.results.get("preconditioned_sharpness" if at.preconditioned else "sharpness")
    return batch_sharpness_limit(at.rule.linear_step, None if sharpest is None else sharpest.value)
