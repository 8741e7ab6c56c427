"""`SPECTRUM`: top eigenvalues, trace and spectrum of Hessian, Gauss-Newton matrix and covariance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stableopt.curvature import Operator
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.measure.quantities import non_uniformity_limit
from stableopt.stability.measure.registry import Need, Quantity
from stableopt.stability.rules.update_rule import UpdateRule
from stableopt.stability.spectrum.measured import (
    OperatorOf,
    measured_density,
    measured_eigenvalues,
    measured_trace,
)

__all__ = ["SPECTRUM"]

_Limit = Callable[[UpdateRule, int | None, int | None], float | None]


def _hessian_limit(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> float | None:
    return rule.max_sharpness


def _sigma_limit(
    rule: UpdateRule, batch_size: int | None, dataset_size: int | None
) -> float | None:
    limit = non_uniformity_limit(rule, batch_size, dataset_size)
    return None if limit is None else limit**2


def _hessian(evaluation: Evaluation) -> Operator:
    return evaluation.hessian()


def _gauss_newton(evaluation: Evaluation) -> Operator:
    return evaluation.gauss_newton()


def _sigma(evaluation: Evaluation) -> Operator:
    return evaluation.non_uniformity()


def _eigenvalues(name: str, operator_of: OperatorOf, evaluation: Evaluation) -> QuantityResult:
    limit = evaluation.results[name].limit if name in evaluation.results else None
    preconditioned = operator_of is _hessian
    return measured_eigenvalues(name, evaluation, operator_of, limit, preconditioned)


def _spectrum(prefix: str, operator_of: OperatorOf, limit: _Limit) -> tuple[Quantity, ...]:
    """Return top eigenvalues, trace and spectrum of one operator."""
    of_hessian = operator_of is _hessian
    needs: frozenset[Need] = frozenset({"step"} if of_hessian else {"step", "per_sample"})
    options: dict[str, Any] = {"operator_of": operator_of, "of_hessian": of_hessian}
    top, trace = f"{prefix}top_eigenvalues", f"{prefix}trace"
    measured_top = partial(_eigenvalues, top, operator_of)
    measured_spectrum = partial(measured_density, **options)
    return (
        Quantity(top, measured_top, needs=needs, limit=limit),
        Quantity(trace, partial(measured_trace, trace, **options), needs=needs),
        Quantity(f"{prefix}spectrum", measured_spectrum, needs=needs, rare=True),
    )


SPECTRUM = (
    *_spectrum("", _hessian, _hessian_limit),
    *_spectrum("gauss_newton_", _gauss_newton, _hessian_limit),
    *_spectrum("sigma_", _sigma, _sigma_limit),
)
"""In the order of measurement."""
