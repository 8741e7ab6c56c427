"""The quantities of curvature: how each is measured, its limit and its chart."""

from __future__ import annotations

import math

from stableopt.curvature import Hessian
from stableopt.curvature.problem.sharded import require_samples
from stableopt.stability.mean_square.critical_lr import critical_lr
from stableopt.stability.mean_square.theorem1 import SecondMomentExcess
from stableopt.stability.measure.batch_sharpness import batch_sharpness_limit
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.generalised_sharpness import measured_generalised_sharpness
from stableopt.stability.measure.largest_batch_sharpness import largest_batch_sharpness
from stableopt.stability.measure.measurement import Measurement, QuantityResult, root
from stableopt.stability.measure.registry import Chart, Quantity
from stableopt.stability.rules.limits import noise_factor
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["CURVATURE", "non_uniformity_limit"]


def _sharpness(evaluation: Evaluation) -> QuantityResult:
    return evaluation.top_eigenvalue("sharpness", evaluation.plain_hessian(), shares=True)


def _preconditioned_sharpness(evaluation: Evaluation) -> QuantityResult:
    name, preconditioner = "preconditioned_sharpness", evaluation.preconditioner
    return evaluation.top_eigenvalue(
        name, evaluation.hessian(), preconditioner=preconditioner, shares=True
    )


def _non_uniformity(evaluation: Evaluation) -> QuantityResult:
    return evaluation.top_eigenvalue(
        "non_uniformity", evaluation.non_uniformity(), value=root, degree=2
    )


def non_uniformity_limit(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> float | None:
    """Return the largest stable non-uniformity, or ``None`` if it is not known."""
    noise_known = batch_size is not None and rule.diagonal and rule.noise_known
    known = rule.full_batch or noise_known
    return rule.max_non_uniformity(batch_size, dataset_size) if known else None


def _theorem1(evaluation: Evaluation) -> QuantityResult:
    rule, hessian = evaluation.rule, evaluation.hessian()
    assert rule is not None
    assert isinstance(hessian, Hessian)
    noise = 0.0
    if not rule.full_batch and evaluation.batch_size is not None:
        noise = noise_factor(evaluation.batch_size, evaluation.dataset_size)
    excess = SecondMomentExcess(
        hessian,
        evaluation.non_uniformity(),
        lr=rule.lr,
        noise=noise,
        weight_decay=0.0 if rule.preconditioned else rule.weight_decay,
    )
    # The operator's largest eigenvalue is the left side of (8) minus 1.
    return evaluation.top_eigenvalue("theorem1", excess, value=lambda excess: excess + 1.0)


def _critical_lr(evaluation: Evaluation) -> QuantityResult:
    rate = critical_lr(
        require_samples(evaluation.problem, "critical_lr"),
        evaluation.batch_size,
        update_rule=evaluation.rule,
        dataset_size=math.inf if evaluation.dataset_size is None else evaluation.dataset_size,
        with_hessian=False,
        seed=evaluation.seed,
    )
    measurement = Measurement(rate.value, rate.residual, rate.products, rate.converged)
    return QuantityResult.from_measurement(measurement, lower=rate.lower)


def _batch_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the ratio of means, over batches up to a relative error of ``tol``, and at most 64."""
    averages = evaluation.batch_sharpness()
    return _batch_average(evaluation, averages.value, averages.standard_error)


def _mean_batch_sharpness(evaluation: Evaluation) -> QuantityResult:
    """Measure the mean of ratios, over the same batches."""
    averages = evaluation.batch_sharpness()
    return _batch_average(evaluation, averages.mean_of_ratios, averages.mean_of_ratios_error)


def _largest_batch_sharpness(evaluation: Evaluation) -> QuantityResult:
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


def _batch_average(evaluation: Evaluation, value: float | None, error: float) -> QuantityResult:
    if value is None:
        return QuantityResult()
    measurement = Measurement.of_average(value, error, evaluation.batch_sharpness().batches)
    return QuantityResult(value, _batch_limit(evaluation), measurement=measurement)


def _batch_limit(evaluation: Evaluation) -> float | None:
    if (
        evaluation.rule is None
        or evaluation.rule.unknown is not None
        or not evaluation.rule.noise_known
    ):
        return None
    name = "preconditioned_sharpness" if evaluation.preconditioned else "sharpness"
    sharpness = evaluation.result(name).value
    return batch_sharpness_limit(evaluation.rule.linear_step, sharpness)


CURVATURE = (
    Quantity(
        "sharpness",
        _sharpness,
        limit=lambda rule, _, __: None if rule.preconditioned else rule.max_sharpness,
        in_box=True,
        chart=Chart("sharpness", r"$\lambda_{\max}(H)$", tag="sharpness"),
    ),
    Quantity(
        "preconditioned_sharpness",
        _preconditioned_sharpness,
        needs={"preconditioner", "step"},
        limit=lambda rule, _, __: rule.max_sharpness if rule.preconditioned else None,
        in_box=True,
        chart=Chart("preconditioned sharpness", r"$\lambda_{\max}(PH)$", "pre_sharp", "pre"),
    ),
    Quantity(
        "non_uniformity",
        _non_uniformity,
        needs={"per_sample", "step"},
        limit=non_uniformity_limit,
        in_box=True,
        chart=Chart("non-uniformity", r"$\lambda_{\max}(\Sigma)^{1/2}$", "non_unif", "nonuf"),
    ),
    Quantity(
        "theorem1",
        _theorem1,
        needs={"rule", "batch_size", "per_sample", "no_momentum", "step"},
        limit=lambda *_: 1.0,
    ),
    Quantity(
        "critical_lr",
        _critical_lr,
        needs={"rule", "batch_size", "per_sample", "step"},
        limits_lr=True,
    ),
    Quantity(
        "batch_sharpness",
        _batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        chart=Chart("batch sharpness", r"$E[g_B^\top H_Bg_B]/E\|g_B\|^2$", "batch", "batch"),
    ),
    Quantity(
        "mean_batch_sharpness",
        _mean_batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        chart=Chart(
            "mean batch sharpness", r"$E[g_B^\top H_Bg_B/\|g_B\|^2]$", "meanbatch", "meanb"
        ),
    ),
    Quantity(
        "largest_batch_sharpness",
        _largest_batch_sharpness,
        needs={"batch_size", "per_sample", "step"},
        limit=lambda rule, _, __: 2 / rule.lr if rule.plain and rule.lr else None,
        chart=Chart("sharpest batch, at most", r"$\max_B\lambda_{\max}(H_B)$", "max_batch", "maxb"),
    ),
    Quantity(
        "generalised_sharpness",
        measured_generalised_sharpness,
        needs={"norm"},
        chart=Chart(
            "generalised sharpness, at least", r"$\max_{\|d\|=1}d^\top Hd$", "gen_sharp", "gen"
        ),
    ),
)
"""In the order of measurement."""
