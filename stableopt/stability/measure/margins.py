"""`StabilityMargins`: the quantities of one measurement, with their limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from stableopt.curvature.spectrum.density import SpectralDensity
from stableopt.stability.layers.table import Layers
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.registry import QUANTITIES, split, text_lines

__all__ = ["EdgeSplit", "StabilityMargins"]


class EdgeSplit(NamedTuple):
    r"""The realised edge as a product, :math:`\zeta = \chi\,\varsigma/\tau`.

    Attributes:
        available: :math:`\chi`, the sharpness over its limit: ``margins.edge_ratio``.
        used: :math:`\varsigma`, the curvature along the step over the sharpness, both in the
            coordinates of the preconditioner: the share of the step in the sharp directions.
        calibration: :math:`\tau = -2g^\top\delta/(k\,\delta^\top P^{-1}\delta)` with the limit k of
            the sharpness: 1 for gradient descent; momentum changes it.
    """

    available: float
    used: float
    calibration: float


class _Shorthand:
    """An attribute for one number of a quantity, such as ``margins.sharpness_limit``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._quantity, self._part = split(name)

    @overload
    def __get__(self, margins: None, owner: type) -> _Shorthand: ...
    @overload
    def __get__(self, margins: StabilityMargins, owner: type) -> float | None: ...
    def __get__(self, margins: StabilityMargins | None, owner: type) -> _Shorthand | float | None:
        if margins is None:
            return self
        number: float | None = getattr(margins[self._quantity], self._part)
        return number


@dataclass(frozen=True, init=False)
class StabilityMargins:
    r"""Sharpness, non-uniformity and other quantities at one step, and their limits of stability.

    ``margins["sharpness"]`` has ``value``, ``limit``, ``ratio``, ``margin`` and ``measurement``; so has
    each quantity of :data:`~stableopt.stability.QUANTITIES`. The attributes below are shorthands.
    ``None`` means "not measured" or "not known"; infinity means "no limit", as for the non-uniformity
    of full-batch gradient descent.

    Attributes:
        step: optimizer steps done.
        lr: learning rate, the largest among the groups.
        batch_size: samples B in a step.
        dataset_size: samples n in the training set; ``None`` for infinitely many.
        loss: mean loss over the probe data, in eval mode.
        sharpness: :math:`a = \lambda_{\max}(H)`.
        sharpness_limit: the largest a at which gradient descent is stable, :math:`2/\eta` for
            plain SGD; ``None`` for a preconditioned step, whose limit is not on H alone.
        preconditioned_sharpness: :math:`\lambda_{\max}(P(H+\Lambda))` with the preconditioner P of the
            optimizer's last step and its coupled weight decay :math:`\Lambda`; ``None`` if the step is
            not preconditioned, or P is not known. Groups with different learning rates or weight
            decays count as preconditioned.
        preconditioned_sharpness_limit: the largest at which the step with constant P is stable,
            :math:`(2+2\beta_1)/((1-\beta_1)\eta)` for Adam.
        non_uniformity: :math:`s = \lambda_{\max}(\Sigma)^{1/2}` of the per-sample Hessians
            :math:`H_i`, or of :math:`P^{1/2}H_iP^{1/2}` for a preconditioned step.
        non_uniformity_limit: the side of the box (9), :math:`\sqrt{B(n-1)/(n-B)}/\eta` for plain
            SGD.
        theorem1: the left side of condition (8), stable up to 1.
        critical_lr: the largest learning rate that is stable in mean square, or an upper bound if
            there are too many directions or the Hessian has negative curvature:
            :func:`~stableopt.stability.critical_lr`.
        critical_lr_lower: a learning rate up to which no second moment grows; 0 if none is known.
        critical_lr_ratio: learning rate over ``critical_lr``. Above 1 the step is unstable; it is
            known to be stable only if the learning rate is below ``critical_lr_lower``.
        batch_sharpness: :func:`~stableopt.stability.batch_sharpness`, at most about its limit where
            SGD stays; ``margins["mean_batch_sharpness"]`` is the other published definition.
        batch_sharpness_limit: :func:`~stableopt.stability.batch_sharpness_limit` at the measured
            sharpness, :math:`2/\eta` for plain SGD.
        generalised_sharpness: a lower bound of :func:`~stableopt.stability.generalised_sharpness`, for
            optimizers that descend in a norm, such as Muon.
        realised_edge: :math:`\zeta = 1 - \Delta L/(g^\top\delta)` of the step just taken, on the
            probe set; above 1 the step raised the loss. ``margins["realised_edge"].details`` has the
            window's ``steps`` and ``standard_error``, and the count of measured steps ``uphill`` so far.
        critical_sharpness: :math:`2/\eta_c` along the step just taken, with the one-step limit
            :math:`2/\eta`: :func:`~stableopt.critical_sharpness`.
        sharpness_ratio: value over limit, 1 at the edge of stability, 0 for an infinite limit; also
            ``preconditioned_sharpness_ratio`` and ``non_uniformity_ratio``.
        sharpness_margin: limit minus value; also ``preconditioned_sharpness_margin`` and
            ``non_uniformity_margin``.
        results: the :class:`~stableopt.stability.QuantityResult` of each quantity that was measured or
            has a limit, by name.
        failure: why the whole measurement failed, or ``None``.
        method: how Hessian-vector products were computed, ``"double backward"`` or ``"central
            differences"``; after commas, what differed from training, such as ``"math attention"``.

    >>> margins = StabilityMargins(lr=0.1, sharpness=15.0, sharpness_limit=20.0)
    >>> margins.sharpness_ratio, margins.sharpness_margin, margins.stable
    (0.75, 5.0, True)
    """

    step: int
    lr: float | None
    batch_size: int | None
    dataset_size: int | None
    loss: float | None
    results: Mapping[str, QuantityResult] = field(default_factory=dict)
    failure: str | None = None
    method: str | None = None

    sharpness = _Shorthand()
    sharpness_limit = _Shorthand()
    sharpness_ratio = _Shorthand()
    sharpness_margin = _Shorthand()
    preconditioned_sharpness = _Shorthand()
    preconditioned_sharpness_limit = _Shorthand()
    preconditioned_sharpness_ratio = _Shorthand()
    preconditioned_sharpness_margin = _Shorthand()
    non_uniformity = _Shorthand()
    non_uniformity_limit = _Shorthand()
    non_uniformity_ratio = _Shorthand()
    non_uniformity_margin = _Shorthand()
    theorem1 = _Shorthand()
    critical_lr = _Shorthand()
    critical_lr_lower = _Shorthand()
    critical_lr_ratio = _Shorthand()
    batch_sharpness = _Shorthand()
    batch_sharpness_limit = _Shorthand()
    batch_sharpness_ratio = _Shorthand()
    generalised_sharpness = _Shorthand()
    generalised_sharpness_limit = _Shorthand()
    generalised_sharpness_ratio = _Shorthand()
    realised_edge = _Shorthand()
    critical_sharpness = _Shorthand()
    critical_sharpness_limit = _Shorthand()
    critical_sharpness_ratio = _Shorthand()

    def __init__(
        self,
        step: int = 0,
        lr: float | None = None,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        loss: float | None = None,
        *,
        results: Mapping[str, QuantityResult] | None = None,
        measurements: Mapping[str, Measurement] | None = None,
        failure: str | None = None,
        method: str | None = None,
        **numbers: float | None,
    ) -> None:
        for key in numbers:
            name, part = split(key)
            if name not in QUANTITIES or part not in _STORED_PARTS:
                raise TypeError(
                    f"{key}={numbers[key]!r}: expected some of {', '.join(QUANTITIES)}, and"
                    " <quantity>_limit"
                )
        results = {
            name: result.compared(lr, limits_lr=name in QUANTITIES and QUANTITIES[name].limits_lr)
            for name, result in _with_numbers(results or {}, numbers, measurements or {}).items()
        }
        names = (*_RUN_FIELDS, "results", "failure", "method")
        values = (step, lr, batch_size, dataset_size, loss, results, failure, method)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)

    def __getitem__(self, name: str) -> QuantityResult:
        """Return the result of one quantity, empty if it was not measured.

        Raises:
            KeyError: for a name that is neither registered nor among the results.

        >>> margins = StabilityMargins(sharpness=15.0, sharpness_limit=20.0)
        >>> margins["sharpness"].ratio, margins["non_uniformity"].value
        (0.75, None)
        """
        if name not in self.results and name not in QUANTITIES:
            known = ", ".join({**QUANTITIES, **self.results})
            attribute = f"margins.{name}, or " if hasattr(type(self), name) else ""
            raise KeyError(f"{name!r}: expected {attribute}one of {known}")
        return self.results.get(name, QuantityResult())

    @property
    def measurements(self) -> dict[str, Measurement]:
        """Residual, products, seconds and convergence of each measured quantity."""
        pairs = ((name, result.measurement) for name, result in self.results.items())
        return {name: measurement for name, measurement in pairs if measurement is not None}

    @property
    def failures(self) -> dict[str, str]:
        """Why single quantities were not measured, by name; the others are valid."""
        pairs = ((name, result.failure) for name, result in self.results.items())
        return {name: failure for name, failure in pairs if failure is not None}

    @property
    def limited_sharpness(self) -> float | None:
        """The sharpness that the limit applies to: the preconditioned one for a preconditioned step.

        ``None`` if it was not measured, as before the first step of an adaptive optimizer.
        """
        preconditioned = self["preconditioned_sharpness"]
        if preconditioned.failure is not None:
            return None
        return self.sharpness if preconditioned.value is None else preconditioned.value

    @property
    def edge_ratio(self) -> float | None:
        """:attr:`limited_sharpness` over its limit, 1 at the edge; ``None`` if no limit is known.

        >>> StabilityMargins(sharpness=15.0, sharpness_limit=20.0).edge_ratio
        0.75
        """
        preconditioned = self.preconditioned_sharpness_ratio
        return self.sharpness_ratio if preconditioned is None else preconditioned

    @property
    def edge_split(self) -> EdgeSplit | None:
        """The factors of the realised edge; ``None`` unless it, sharpness and limit are known.

        >>> from stableopt.stability import QuantityResult
        >>> results = {"realised_edge": QuantityResult(0.5, details={"calibration": 1.0})}
        >>> StabilityMargins(results=results, sharpness=20.0, sharpness_limit=20.0).edge_split
        EdgeSplit(available=1.0, used=0.5, calibration=1.0)
        """
        calibration = self["realised_edge"].details.get("calibration")
        if self.realised_edge is None or calibration is None or not self.edge_ratio:
            return None
        used = self.realised_edge * calibration / self.edge_ratio
        return EdgeSplit(self.edge_ratio, used, calibration)

    @property
    def layers(self) -> Layers | None:
        """The quantity ``"layers"``, else each layer's share of the top eigenvector.

        The eigenvector is that of :attr:`limited_sharpness`. ``None`` if neither was measured, and if P
        has entries between parameters, as that of L-BFGS: layers then have no shares.
        """
        has_p = self.preconditioned_sharpness is not None
        for name in ("layers", "preconditioned_sharpness" if has_p else "sharpness"):
            if (layers := self[name].layers) is not None:
                return layers
        return None

    @property
    def stable(self) -> bool | None:
        """Whether the measured ratios of the box (9) are at most 1; ``None`` if a limit is not known."""
        ratios = [r for r in (self.edge_ratio, self.non_uniformity_ratio) if r is not None]
        limit_missing = self.non_uniformity is not None and self.non_uniformity_ratio is None
        if not ratios or (limit_missing and max(ratios) <= 1):
            return None
        return max(ratios) <= 1

    @property
    def converged(self) -> bool:
        """Whether the measurement succeeded and every value reached its tolerance."""
        succeeded = self.failure is None and not self.failures
        return succeeded and all(m.converged for m in self.measurements.values())

    @property
    def certified(self) -> bool:
        """Whether the measured sharpnesses and non-uniformity are all certified.

        See :attr:`~stableopt.stability.Measurement.certified`.
        """
        in_box = [self[name].measurement for name, q in QUANTITIES.items() if q.in_box]
        measured = [measurement for measurement in in_box if measurement is not None]
        return self.failure is None and bool(measured) and all(m.certified for m in measured)

    @property
    def seconds(self) -> float:
        """Wall time of the quantities that have a measurement."""
        return sum(m.seconds for m in self.measurements.values())

    def __str__(self) -> str:
        run = {"step": self.step, "loss": self.loss, "lr": self.lr, "batch size": self.batch_size}
        return "\n".join(filter(None, [*text_lines(run, self.results), self.failure]))

    def record(self) -> dict[str, float]:
        """Return the record that sinks receive: every known number by name, ratios included.

        ``<quantity>_upper_bound`` is included after a random start, and infinite limits always. A
        failed measurement has no values, and ``failed`` is 1.

        >>> StabilityMargins(sharpness=15.0, sharpness_limit=20.0).record()["sharpness_ratio"]
        0.75
        """
        numbers = {name: getattr(self, name) for name in _RUN_FIELDS if name != "step"}
        numbers |= self._numbers(*_STORED_PARTS, "ratio", "upper_bound")
        record = {name: float(value) for name, value in numbers.items() if value is not None}
        for name, result in self.results.items():
            record |= {f"{name}_{key}": float(value) for key, value in result.details.items()}
        record["seconds"] = self.seconds
        record["failed"] = float(self.failure is not None)
        record["converged"] = float(self.converged)
        record["certified"] = float(self.certified)
        return record

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and dicts for checkpoints; :meth:`from_dict` reads them."""
        measurements = {
            name: {key: part for key, part in dataclasses.asdict(m).items() if part is not None}
            for name, m in self.measurements.items()
        }
        results = self.results.items()
        details = {name: dict(result.details) for name, result in results if result.details}
        densities = {
            name: dataclasses.asdict(result.density)
            for name, result in results
            if result.density is not None
        }
        layers = {name: result.layers.to_dict() for name, result in results if result.layers}
        optional: dict[str, Any] = {"failures": self.failures, "details": details}
        optional |= {"densities": densities, "layers_of": layers}
        return {
            **{name: getattr(self, name) for name in _RUN_FIELDS},
            **self._numbers(*_STORED_PARTS),
            "measurements": measurements,
            **{name: part for name, part in optional.items() if part},
            "failure": self.failure,
            "method": self.method,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> StabilityMargins:
        """Return the margins that :meth:`to_dict` wrote.

        >>> margins = StabilityMargins(step=3, sharpness=1.0)
        >>> StabilityMargins.from_dict(margins.to_dict()) == margins
        True
        """
        common = {key: state[key] for key in (*_RUN_FIELDS, "failure", "method") if key in state}
        # All other keys are numbers, also of quantities that are not registered here.
        others = (*common, "measurements", "failures", "details", "densities", "layers_of")
        numbers = {name: state[name] for name in state if name not in others}
        measurements = {name: Measurement(**m) for name, m in state["measurements"].items()}
        failures, details = state.get("failures", {}), state.get("details", {})
        layers = {name: Layers.from_dict(t) for name, t in state.get("layers_of", {}).items()}
        densities = {name: _density(d) for name, d in state.get("densities", {}).items()}
        results = {
            name: QuantityResult(
                failure=failures.get(name),
                details=details.get(name, {}),
                density=densities.get(name),
                layers=layers.get(name),
            )
            for name in {**failures, **details, **densities, **layers}
        }
        return cls(**common, results=_with_numbers(results, numbers, measurements))

    def _numbers(self, *parts: str) -> dict[str, float | None]:
        return {
            name if part == "value" else f"{name}_{part}": getattr(result, part)
            for name, result in self.results.items()
            for part in parts
            if getattr(result, part) is not None
        }


_RUN_FIELDS = ("step", "lr", "batch_size", "dataset_size", "loss")

_STORED_PARTS = ("value", "limit", "lower")
"""The parts of a result that are stored; the others are derived."""


def _density(stored: Mapping[str, Any]) -> SpectralDensity:
    """Return a stored density; JSON has made its tuples lists."""
    tuples = {name: tuple(stored[name]) for name in ("nodes", "weights")}
    return SpectralDensity(**{**stored, **tuples})


def _with_numbers(
    results: Mapping[str, QuantityResult],
    numbers: Mapping[str, float | None],
    measurements: Mapping[str, Measurement],
) -> dict[str, QuantityResult]:
    """Add numbers, named as in a record, and measurements to ``results``; drop empty results."""
    changes: dict[str, dict[str, Any]] = {name: {} for name in results}
    for key, number in numbers.items():
        name, part = split(key)
        changes.setdefault(name, {})[part] = number
    for name, measurement in measurements.items():
        changes.setdefault(name, {})["measurement"] = measurement
    changed = {
        name: dataclasses.replace(results.get(name, QuantityResult()), **parts)
        for name, parts in changes.items()
    }
    return {name: result for name, result in changed.items() if result != QuantityResult()}
