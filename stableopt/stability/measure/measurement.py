"""`Measurement` and `QuantityResult`: a measured value with its accuracy, and with its limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from stableopt.curvature.eigen.result import GAP
from stableopt.curvature.spectrum.density import SpectralDensity
from stableopt.stability.layers.table import Layers

__all__ = ["Measurement", "QuantityResult"]


@dataclass(frozen=True)
class Measurement:
    """One measured value, its accuracy and its cost.

    Attributes:
        value: the value itself.
        residual: the eigen-solver's residual ``|Av - xv|``, relative to the eigenvalue x, and half
            of that for a value that is its root; of an average, its relative standard error.
        products: operator products used.
        seconds: wall time.
        converged: whether the residual fell below the tolerance and, from a random start, a value more
            than 5 % higher is improbable.
        upper_bound: an upper bound of the value, wrong for at most 0.2 % of random starts; ``None``
            where none is known, as after a warm start.

    >>> Measurement(10.0, 1e-3, 12, 0.1, converged=True, upper_bound=10.3).certified
    True
    """

    value: float
    residual: float
    products: int
    seconds: float
    converged: bool
    upper_bound: float | None = None

    @property
    def certified(self) -> bool:
        """Whether ``upper_bound`` is at most 5 % above the value; if not, a larger one may be missed.

        A value is otherwise only known to be near *an* eigenvalue. Tracking certifies its cold starts.
        """
        # 1e-6: the bound is often 5 % above the value itself, up to rounding.
        return self.upper_bound is not None and (
            self.upper_bound - self.value <= (1 + 1e-6) * GAP * abs(self.value)
        )

    def within(self, error: float, tol: float) -> Measurement:
        """Return it for products that have a relative error themselves, as finite differences do."""
        if error == 0:
            return self
        residual, bound = max(self.residual, error), self.upper_bound
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
        value: what was measured; ``None`` if it was not.
        limit: the largest value that the update rule allows; ``None`` if it is not known, infinity
            if there is none.
        ratio: value over limit, 1 at the edge of stability. For a value that is itself a limit on
            the learning rate: learning rate over value.
        lower: where the value is an upper bound, a bound from below.
        measurement: residual, products, seconds and convergence.
        failure: why this quantity alone was not measured, or ``None``.
        details: further numbers by name; in records as ``<quantity>_<name>``.
        density: the distribution of eigenvalues, where that was measured; not in records.
        layers: what is known of each layer: with a sharpness its share of the top eigenvector.

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
        """Return the result of one measurement, without limit and ratio."""
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
        """Return it with its ratio, with ``limits_lr`` that of ``lr`` to the value."""
        pair = (lr, self.value) if limits_lr else (self.value, self.limit)
        return dataclasses.replace(self, ratio=_ratio(*pair))


def _ratio(value: float | None, limit: float | None) -> float | None:
    if value is None or limit is None:
        return None
    # A limit of zero or less allows no value: every step is beyond the edge.
    return value / limit if limit > 0 else math.inf
