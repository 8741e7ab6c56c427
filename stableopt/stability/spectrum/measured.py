"""Measurements of several top eigenvalues, traces and spectra, for any matrix of an evaluation."""

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

Matrix = Callable[[Evaluation], Operator]

FEWEST, MOST, WITHOUT_LIMIT = 3, 20, 5
"""Eigenvalues measured at least and at most, and where no limit is known."""

CLOSE = 0.75
"""Share of the limit below which the last of them lies."""

STARTS, STEPS = 5, 50
"""Random starts of a spectrum, and products of each."""


def measured_eigenvalues(
    name: str, at: Evaluation, of: Matrix, limit: float | None, preconditioner: bool = True
) -> QuantityResult:
    """Measure the largest eigenvalues of a matrix, down to 0.75 of ``limit``, and count those above."""
    known = limit if limit is not None and 0 < limit < math.inf else None
    vectors = at.vectors_held()
    most = max(min(MOST, vectors - FEWEST_MORE), 1)
    # As many as in the last measurement, so that curves do not end.
    least = min(max(FEWEST, int(at.memory.get(name, 0))), most)
    operator = of(at)
    found = top_eigenpairs(
        operator,
        min(WITHOUT_LIMIT, most) if known is None else most,
        down_to=None if known is None else CLOSE * known,
        least=least,
        preconditioner=_kept(at) if preconditioner else None,
        start=(at.starts or {}).get(name),
        tol=at.tol,
        # Each pair takes about two products, the second start a dozen.
        max_iter=4 * at.max_iter,
        seed=at.seed,
        most_vectors=max(most + FEWEST_MORE, min(most + MORE, vectors)),
    )
    if at.starts is not None:
        at.subspaces[name] = found.subspace
        at.memory[name] = len(found.values)
    values, error = found.values.tolist(), at.error_of(operator)
    relative = found.absolute_residuals / found.values.abs().clamp(min=1e-300)
    bound = None if found.upper_bounds is None else float(found.upper_bounds[0])
    measurement = Measurement(
        values[0], float(relative[0]), found.products, 0.0, found.converged, upper_bound=bound
    )
    details = {str(index): value for index, value in enumerate(values[1:], start=2)}
    if known is not None:
        details["above"] = found.above(known)
    result = QuantityResult.from_measurement(measurement.within(error, at.tol))
    return dataclasses.replace(result, details=details)


def measured_trace(name: str, at: Evaluation, of: Matrix, *, of_hessian: bool) -> QuantityResult:
    """Measure a trace, with its standard error and the effective rank."""
    operator, preconditioner = of(at), _kept(at) if of_hessian else None
    found = trace(
        operator,
        preconditioner=preconditioner,
        tol=at.tol,
        max_iter=4 * at.max_iter,
        seed=at.seed,
        most_vectors=at.vectors_held(),
    )
    relative = found.standard_error / abs(found.value) if found.value else 0.0
    measurement = Measurement(found.value, relative, found.products, 0.0, found.converged)
    details = {"standard_error": found.standard_error}
    if found.largest > 0:
        details["effective_rank"] = found.effective_rank
    if of_hessian and not at.preconditioned and found.value > 0:
        bounds = zeroth_order_lr(found.value, found.largest)
        details |= {"zeroth_order_lr": bounds.upper, "zeroth_order_lr_lower": bounds.lower}
    result = QuantityResult.from_measurement(measurement.within(at.error_of(operator), at.tol))
    return dataclasses.replace(result, details=details)


def measured_density(at: Evaluation, of: Matrix, *, of_hessian: bool) -> QuantityResult:
    """Measure the distribution of the eigenvalues; the value is the smallest node.

    Raises:
        ValueError: with a preconditioner that has no root to multiply by.
    """
    if of_hessian and _kept(at) is not None:
        raise ValueError(
            "the spectrum needs a preconditioner with a root that can be multiplied by, and this one"
            " is not diagonal: expected top_eigenvalues and trace instead"
        )
    # Large models have room for few vectors, and then for a coarse spectrum.
    steps = STEPS if at.vectors_held() >= MOST_VECTORS else at.vectors_held()
    found = spectral_density(of(at), starts=STARTS, steps=steps, seed=at.seed)
    low, high = found.nodes[0], found.nodes[-1]
    measurement = Measurement(low, 0.0, found.products, 0.0, converged=True)
    # Of a matrix with many zero eigenvalues rounding leaves some on either side.
    zero = 1e-6 * max(abs(low), abs(high))
    negative = float(found.cumulative(torch.tensor([-zero])))
    details = {"largest": high, "negative": negative}
    return QuantityResult(low, measurement=measurement, details=details, density=found)


def _kept(at: Evaluation) -> StepPreconditioner | None:
    """Return the preconditioner that the coordinates do not contain."""
    known = at.preconditioned and at.rule is not None and at.rule.unknown is None
    return at.preconditioner if known else None
