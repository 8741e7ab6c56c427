"""The measured quantities of mini-batches, with limits that need the measured sharpness."""

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


def measured_batch_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the ratio of means, over batches up to a relative error of ``tol``, and at most 64."""
    averages = _batch_averages(evaluation)
    return _average(evaluation, averages.value, averages.standard_error)


def measured_mean_batch_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the mean of ratios, over the same batches."""
    averages = _batch_averages(evaluation)
    return _average(evaluation, averages.mean_of_ratios, averages.mean_of_ratios_error)


def measured_largest_batch_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the bounds of the sharpest batch."""
    assert evaluation.batch_size is not None
    problem = require_samples(evaluation.problem, "largest_batch_sharpness")
    bounds = largest_batch_sharpness(
        problem,
        evaluation.batch_size,
        tol=evaluation.tol,
        max_iter=evaluation.max_iter,
        seed=evaluation.seed,
    )
    measurement = Measurement(bounds.upper, None, bounds.products, math.isfinite(bounds.upper))
    return QuantityResult.from_measurement(measurement, lower=bounds.lower)


def _batch_averages(evaluation: Evaluation) -> BatchSharpness:
    assert evaluation.batch_size is not None
    if evaluation.batch_averages is None:
        problem = require_samples(evaluation.problem, "batch_sharpness")
        evaluation.batch_averages = batch_sharpness(
            problem, evaluation.batch_size, rel_error=evaluation.tol, seed=evaluation.seed
        )
    return evaluation.batch_averages


def _average(evaluation: Evaluation, value: float | None, error: float) -> QuantityResult:
    if value is None:
        return QuantityResult()
    # An average has a standard error instead of a residual, and counts as converged.
    relative = error / abs(value) if value else 0.0
    measurement = Measurement(value, relative, _batch_averages(evaluation).batches)
    return QuantityResult(value, _limit(evaluation), measurement=measurement)


def _limit(evaluation: Evaluation) -> float | None:
    if (
        evaluation.rule is None
        or evaluation.rule.unknown is not None
        or not evaluation.rule.noise_known
    ):
        return None
    name = "preconditioned_sharpness" if evaluation.preconditioned else "sharpness"
    sharpness = evaluation.results.get(name, QuantityResult()).value
    return batch_sharpness_limit(evaluation.rule.linear_step, sharpness)
