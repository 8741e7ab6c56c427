"""Measurements of top eigenvalues, traces and spectral densities of an evaluation's operators."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from stableopt.curvature import Operator, spectral_density, top_eigenpairs, trace
from stableopt.curvature.eigen.top_eigenpairs import FEWEST_MORE, MORE
from stableopt.curvature.problem.cost import MOST_VECTORS
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.rules.preconditioner import StepPreconditioner
from stableopt.stability.spectrum.zeroth_order import zeroth_order_lr

__all__ = ["measured_density", "measured_eigenvalues", "measured_trace"]

OperatorOf = Callable[[Evaluation], Operator]

FEWEST, MOST, WITHOUT_LIMIT = 3, 20, 5
"""Fewest and most eigenvalues measured, and their number if no limit is known."""

CLOSE = 0.75
"""Eigenvalues are measured down to this share of the limit."""

STARTS, STEPS = 5, 50
"""Random starts of a spectral density, and products for each."""


def measured_eigenvalues(
    name: str,
    evaluation: Evaluation,
    operator_of: OperatorOf,
    limit: float | None,
    preconditioner: bool = True,
) -> QuantityResult:
    """Measure the largest eigenvalues down to 0.75 of ``limit``, and count those above the limit."""
    if limit is not None and not 0 < limit < math.inf:
        limit = None
    vectors = evaluation.vectors_held()
    most = max(min(MOST, vectors - FEWEST_MORE), 1)
    # At least as many as in the last measurement, so that their curves continue.
    least = min(max(FEWEST, int(evaluation.memory.get(name, 0))), most)
    operator = operator_of(evaluation)
    eigenpairs = top_eigenpairs(
        operator,
        min(WITHOUT_LIMIT, most) if limit is None else most,
        down_to=None if limit is None else CLOSE * limit,
        least=least,
        preconditioner=_separate_preconditioner(evaluation) if preconditioner else None,
        start=(evaluation.starts or {}).get(name),
        tol=evaluation.tol,
        # Each eigenpair takes about two products, the second random start a dozen.
        max_iter=4 * evaluation.max_iter,
        seed=evaluation.seed,
        most_vectors=max(most + FEWEST_MORE, min(most + MORE, vectors)),
    )
    if evaluation.starts is not None:
        evaluation.subspaces[name] = eigenpairs.subspace
        evaluation.memory[name] = len(eigenpairs.values)
    values, error = eigenpairs.values.tolist(), evaluation.difference_error(operator)
    relative = eigenpairs.absolute_residuals / eigenpairs.values.abs().clamp(min=1e-300)
    bound = None if eigenpairs.upper_bounds is None else float(eigenpairs.upper_bounds[0])
    measurement = Measurement(
        values[0],
        float(relative[0]),
        eigenpairs.products,
        eigenpairs.converged,
        upper_bound=bound,
    )
    details = {str(index): value for index, value in enumerate(values[1:], start=2)}
    if limit is not None:
        details["above"] = eigenpairs.above(limit)
    result = QuantityResult.from_measurement(measurement.within(error, evaluation.tol))
    return dataclasses.replace(result, details=details)


def measured_trace(
    name: str, evaluation: Evaluation, operator_of: OperatorOf, *, of_hessian: bool
) -> QuantityResult:
    """Measure a trace, with its standard error and the effective rank."""
    operator = operator_of(evaluation)
    estimate = trace(
        operator,
        preconditioner=_separate_preconditioner(evaluation) if of_hessian else None,
        tol=evaluation.tol,
        max_iter=4 * evaluation.max_iter,
        seed=evaluation.seed,
        most_vectors=evaluation.vectors_held(),
    )
    error = estimate.standard_error
    measurement = Measurement.of_average(
        estimate.value, error, estimate.products, converged=estimate.converged
    )
    details = {"standard_error": error}
    if estimate.largest > 0:
        details["effective_rank"] = estimate.effective_rank
    if of_hessian and not evaluation.preconditioned and estimate.value > 0:
        bounds = zeroth_order_lr(estimate.value, estimate.largest)
        details |= {"zeroth_order_lr": bounds.upper, "zeroth_order_lr_lower": bounds.lower}
    result = QuantityResult.from_measurement(
        measurement.within(evaluation.difference_error(operator), evaluation.tol)
    )
    return dataclasses.replace(result, details=details)


def measured_density(
    evaluation: Evaluation, operator_of: OperatorOf, *, of_hessian: bool
) -> QuantityResult:
    """Measure the distribution of the eigenvalues; the value is the smallest node.

    Raises:
        ValueError: with a preconditioner that is not diagonal.
    """
    if of_hessian and _separate_preconditioner(evaluation) is not None:
        raise ValueError(
            "the spectrum needs a diagonal preconditioner, and this one is not diagonal: expected"
            " top_eigenvalues and trace instead"
        )
    operator, vectors = operator_of(evaluation), evaluation.vectors_held()
    # With room for few vectors, as for large models, the density is coarse.
    steps = STEPS if vectors >= MOST_VECTORS else vectors
    density = spectral_density(operator, starts=STARTS, steps=steps, seed=evaluation.seed)
    low, high = density.nodes[0], density.nodes[-1]
    measurement = Measurement(low, None, density.products)
    # Rounding moves zero eigenvalues to both sides of 0.
    rounding = 1e-6 * max(abs(low), abs(high))
    negative = float(density.cumulative(torch.tensor([-rounding], device="cpu")))
    details = {"largest": high, "negative": negative}
    return QuantityResult(low, measurement=measurement, details=details, density=density)


def _separate_preconditioner(evaluation: Evaluation) -> StepPreconditioner | None:
    """Return the preconditioner that the coordinates do not include; ``None`` if not known."""
    rule = evaluation.rule
    if rule is None or not rule.preconditioned or rule.unknown is not None:
        return None
    return evaluation.preconditioner
