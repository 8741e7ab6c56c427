"""`Measurement`: a value with its accuracy and cost; `QuantityResult`: a measurement with its limit.

`ratio_to_limit` compares the two, and `root` maps the top eigenvalue of a covariance to the quantity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stableopt.curvature.eigen.result import GAP, Eigenpair
from stableopt.curvature.spectrum.density import SpectralDensity
from stableopt.stability.layers.table import Layers

__all__ = ["Measurement", "QuantityResult", "level", "ratio_to_limit", "root"]

_NEAR, _OVER = 0.9, 1.01
"""Ratios from which a value is near its limit, and above which it is over it."""


@dataclass(frozen=True)
class Measurement:
    """One measured value, its accuracy and its cost.

    Attributes:
        value: the value itself.
        residual: the relative residual ``|Av - xv| / |x|`` of the eigenpair; half of it if the value
            is the root of the eigenvalue x. For an average, the relative standard error. ``None`` for a
            value that has neither, such as a bound.
        products: the number of operator products.
        converged: whether the residual is below the tolerance and, after a random start, a value more
            than 5 % higher is improbable.
        seconds: wall time.
        upper_bound: an upper bound of the value, wrong for at most 0.2 % of random starts; ``None``
            if it is not known, as after a warm start.

    >>> Measurement(10.0, 1e-3, 12, upper_bound=10.3).certified
    True
    """

    value: float
    residual: float | None = None
    products: int = 0
    converged: bool = True
    seconds: float = 0.0
    upper_bound: float | None = None

    @classmethod
    def of_eigenpair(
        cls, pair: Eigenpair, value: Callable[[float], float] = float, degree: int = 1
    ) -> Measurement:
        """Return the measurement of a function of the eigenvalue.

        Args:
            pair: the top eigenpair.
            value: the function.
            degree: the eigenvalue's relative error over the function's: 2 for a square root.
        """
        return cls(
            value(pair.value),
            pair.relative_residual / degree,
            pair.products,
            pair.converged,
            upper_bound=None if pair.upper_bound is None else value(pair.upper_bound),
        )

    @classmethod
    def of_average(
        cls, value: float, standard_error: float, products: int, *, converged: bool = True
    ) -> Measurement:
        """Return the measurement of an average, with its standard error as a residual.

        >>> Measurement.of_average(2.0, 0.5, 8).residual
        0.25
        """
        relative = standard_error / abs(value) if value else 0.0
        return cls(value, relative, products, converged)

    @property
    def absolute_error(self) -> float:
        """The residual or standard error in the units of the value; 0 if the value has neither."""
        return (self.residual or 0.0) * abs(self.value)

    @property
    def certified(self) -> bool:
        """Whether ``upper_bound`` is at most 5 % above the value.

        Otherwise the value is near *an* eigenvalue, perhaps not the largest. A monitor certifies its
        measurements from random starts.
        """
        # 1e-6: many bounds are exactly 5 % above the value, up to rounding.
        return self.upper_bound is not None and (
            self.upper_bound - self.value <= (1 + 1e-6) * GAP * abs(self.value)
        )

    def within(self, error: float, tol: float) -> Measurement:
        """Return the measurement with the relative ``error`` of its products, as of finite differences.

        The residual is at least the error, the upper bound grows by it.
        """
        if error == 0:
            return self
        residual, bound = max(self.residual or 0.0, error), self.upper_bound
        return dataclasses.replace(
            self,
            residual=residual,
            converged=self.converged and residual <= tol,
            upper_bound=None if bound is None else bound + error * abs(bound),
        )


@dataclass(frozen=True)
class QuantityResult:
    """One quantity at one step: ``margins["sharpness"]``.

    Attributes:
        value: the measured value; ``None`` if it was not measured.
        limit: the largest stable value under the update rule; ``None`` if it is not known, infinity
            if every value is stable.
        ratio: value over limit, 1 at the edge of stability. If the value is itself a limit on the
            learning rate: learning rate over value.
        lower: a lower bound, if the value is an upper bound.
        measurement: residual, products, seconds and convergence.
        failure: why this quantity was not measured, or ``None``.
        details: further numbers by name; records have them as ``<quantity>_<name>``.
        density: the spectral density, if it was measured; not in records.
        layers: the measured columns of each layer; for a sharpness, shares of the top eigenvector.

    >>> QuantityResult(value=15.0, limit=20.0).compared().ratio
    0.75
    """

    value: float | None = None
    limit: float | None = None
    ratio: float | None = None
    lower: float | None = None
    measurement: Measurement | None = None
    failure: str | None = None
    details: Mapping[str, float] = field(default_factory=dict, hash=False)
    density: SpectralDensity | None = None
    layers: Layers | None = None

    @classmethod
    def from_measurement(
        cls, measurement: Measurement, lower: float | None = None
    ) -> QuantityResult:
        """Return the result of ``measurement``, without limit and ratio."""
        return cls(value=measurement.value, lower=lower, measurement=measurement)

    @property
    def upper_bound(self) -> float | None:
        """The measurement's upper bound of the value, if there is one."""
        return None if self.measurement is None else self.measurement.upper_bound

    @property
    def margin(self) -> float | None:
        """Limit minus value."""
        return None if self.value is None or self.limit is None else self.limit - self.value

    def compared(self, lr: float | None = None, *, limits_lr: bool = False) -> QuantityResult:
        """Return the result with its ratio: value over limit or, with ``limits_lr``, lr over value."""
        value, limit = (lr, self.value) if limits_lr else (self.value, self.limit)
        ratio = None if value is None or limit is None else ratio_to_limit(value, limit)
        return dataclasses.replace(self, ratio=ratio)


def root(eigenvalue: float) -> float:
    """Return the root of an eigenvalue that only rounding makes negative; then 0."""
    return math.sqrt(max(eigenvalue, 0.0))


def ratio_to_limit(value: float, limit: float) -> float:
    """Return value over limit; infinity under a limit of zero or less, where no value is stable.

    >>> ratio_to_limit(15.0, 20.0), ratio_to_limit(1.0, -0.1)
    (0.75, inf)
    """
    return value / limit if limit > 0 else math.inf


def level(ratio: float) -> str:
    """Return where a ratio lies: inside the limit, near it, or over it.

    >>> level(0.5), level(1.0), level(1.2)
    ('inside', 'near', 'over')
    """
    if ratio > _OVER:
        return "over"
    return "near" if ratio >= _NEAR else "inside"
