"""`Measurement` and `QuantityResult`: one measured value with its accuracy, and beside its limit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["Measurement", "QuantityResult"]


@dataclass(frozen=True)
class Measurement:
    """One measured value, its accuracy and its cost.

    Attributes:
        value: the value itself.
        residual: the eigen-solver's residual ``|Av - xv|``, relative to the eigenvalue x, and half
            of that for a value that is its root; of an average, its relative standard error.
        products: products with the operator that it took.
        seconds: wall time.
        converged: whether the residual fell below the tolerance.
    """

    value: float
    residual: float
    products: int
    seconds: float
    converged: bool

    def within(self, error: float, tol: float) -> Measurement:
        """Return it for products that have a relative error themselves, as finite differences do."""
        if error == 0:
            return self
        residual = max(self.residual, error)
        return dataclasses.replace(
            self, residual=residual, converged=self.converged and residual <= tol
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

    >>> QuantityResult(value=15.0, limit=20.0).compared().ratio
    0.75
    """

    value: float | None = None
    limit: float | None = None
    ratio: float | None = None
    lower: float | None = None
    measurement: Measurement | None = None

    @property
    def margin(self) -> float | None:
        """Limit minus value."""
        return None if self.value is None or self.limit is None else self.limit - self.value

    def compared(self) -> QuantityResult:
        """Return it with the ratio of value and limit."""
        return dataclasses.replace(self, ratio=_ratio(self.value, self.limit))

    def compared_with(self, lr: float | None) -> QuantityResult:
        """Return it with the ratio of ``lr`` and a value that is a limit on the learning rate."""
        return dataclasses.replace(self, ratio=_ratio(lr, self.value))


def _ratio(value: float | None, limit: float | None) -> float | None:
    if value is None or limit is None:
        return None
    # A limit of zero or less allows no value: every step is beyond the edge.
    return value / limit if limit > 0 else math.inf
