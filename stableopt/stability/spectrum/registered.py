"""The registry's entries for the spectrum of each matrix, registered on import."""

from __future__ import annotations

from functools import partial

from stableopt.curvature import Operator
from stableopt.stability.measure.evaluation import Evaluation
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.measure.quantities import QUANTITIES, Need, Quantity, register
from stableopt.stability.rules.update_rule import UpdateRule
from stableopt.stability.spectrum.measured import (
    Matrix,
    measured_density,
    measured_eigenvalues,
    measured_trace,
)

__all__: list[str] = []

_Limit = tuple[UpdateRule, int | None, int | None]


def _of_hessian(rule: UpdateRule, batch_size: int | None, dataset_size: int | None) -> float | None:
    return rule.max_sharpness


def _of_sigma(rule: UpdateRule, batch_size: int | None, dataset_size: int | None) -> float | None:
    limit = QUANTITIES["non_uniformity"].limit_of(rule, batch_size, dataset_size)
    return None if limit is None else limit**2


def _hessian(at: Evaluation) -> Operator:
    return at.hessian()


def _gauss_newton(at: Evaluation) -> Operator:
    return at.gauss_newton()


def _sigma(at: Evaluation) -> Operator:
    return at.non_uniformity()


def _eigenvalues(name: str, of: Matrix, at: Evaluation) -> QuantityResult:
    limit = at.results[name].limit if name in at.results else None
    return measured_eigenvalues(name, at, of, limit, preconditioner=of is _hessian)


for _prefix, _of, _limit in (
    ("", _hessian, _of_hessian),
    ("gauss_newton_", _gauss_newton, _of_hessian),
    ("sigma_", _sigma, _of_sigma),
):
    _plain = _of is _hessian
    _needs: frozenset[Need] = frozenset({"step"} if _plain else {"step", "per_sample"})
    _name = f"{_prefix}top_eigenvalues"
    register(Quantity(_name, partial(_eigenvalues, _name, _of), needs=_needs, limit=_limit))
    _name = f"{_prefix}trace"
    register(
        Quantity(_name, partial(measured_trace, _name, of=_of, of_hessian=_plain), needs=_needs)
    )
    register(
        Quantity(
            f"{_prefix}spectrum",
            partial(measured_density, of=_of, of_hessian=_plain),
            needs=_needs,
            rare=True,
        )
    )
