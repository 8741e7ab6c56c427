r"""One linear mode of an optimizer's step: the recursion that all limits are read off.

The step is that of ``torch.optim.SGD``, and of the adaptive optimizers whose preconditioner is held
fixed: with learning rate :math:`\eta`, momentum :math:`\beta`, dampening :math:`\tau`, coupled weight
decay :math:`\lambda` and decoupled :math:`\lambda'`,

.. math::
    g = (h+\lambda)x, \quad m' = \beta m + (1-\tau) g, \quad
    x' = (1-\eta\lambda')\,x - \eta\,(A g + B m'),

where A, B are 0, 1 for heavy-ball momentum, 1, :math:`\beta` for Nesterov's, and :math:`1-\nu, \nu`
for a share :math:`\nu` of the momentum (quasi-hyperbolic momentum, Ma & Yarats, ICLR 2019). With
:math:`c = 1-\eta\lambda'`, :math:`u = A + B(1-\tau)`, :math:`w = \beta A` and curvature in units of
the rate, :math:`k = \eta(h+\lambda)`,

.. math:: x_{t+1} = (c + \beta - u k_t)\,x_t - (\beta c - w k_{t-1})\,x_{t-1}.

For a fixed k its roots are within the unit disc if :math:`|T| < 1+\Delta` and :math:`\Delta < 1`, T and
:math:`\Delta` their sum and product (Jury): the first to leave does so at -1 as k grows, at 1 as it
falls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

__all__ = ["LinearMode", "linear_mode"]


class LinearMode(NamedTuple):
    """The coefficients of one mode, the learning rate taken into the curvature: x = eta h."""

    beta: float
    gain: float  # 1 - tau
    kept: float  # c, what decoupled decay leaves of the parameter
    now: float  # A, the weight of the gradient itself
    weight: float  # B, the weight of the momentum

    @property
    def averaged(self) -> float:
        """What the step takes of the present gradient by way of the momentum: B (1 - tau)."""
        return self.weight * self.gain

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest x at which the step is stable without noise."""
        beta, a, b = self.beta, self.now, self.averaged
        low = -(1 - self.kept) * (1 - beta) / (a * (1 - beta) + b)
        return low, (1 + beta) * (1 + self.kept) / (a * (1 + beta) + b)

    def variance(self, x: float) -> float:
        """Return the largest variance of x at its mean ``x``."""
        above, below = self._quotient()
        return float(above(x) / below(x))

    def peak(self) -> float:
        """Return the largest :meth:`variance` over all means within :attr:`range`."""
        above, below = self._quotient()
        # Stationary where N' D = N D': a cubic.
        roots = (above.deriv() * below - above * below.deriv()).roots()
        real = roots.real[np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots.real))]
        low, high = self.range
        return max((self.variance(float(x)) for x in real if low < x < high), default=0.0)

    def _quotient(self) -> tuple[Polynomial, Polynomial]:
        """Return numerator and denominator of :meth:`variance`, as polynomials of x."""
        u, w = self.now + self.averaged, self.beta * self.now
        trace = Polynomial([self.kept + self.beta, -u])
        det = Polynomial([self.beta * self.kept, -w])
        above = (1 - det) * (1 + det - trace) * (1 + det + trace)
        below = (u * u + w * w) * (1 + det) - 2 * u * w * trace
        return above, below


def linear_mode(
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    decoupled_weight_decay: float,
    momentum_share: float,
) -> LinearMode:
    """Return the coefficients after checking the ranges."""
    if not lr >= 0:
        raise ValueError(f"lr={lr}: expected at least 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: expected at least 0 and below 1")
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected below 1")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov with momentum={momentum}, dampening={dampening}: expected momentum above 0"
            " and no dampening"
        )
    if not 0 <= momentum_share <= 1 or (nesterov and momentum_share != 1):
        raise ValueError(
            f"momentum_share={momentum_share}: expected at least 0 and at most 1, and 1 with nesterov"
        )
    if not decoupled_weight_decay >= 0:
        raise ValueError(f"decoupled_weight_decay={decoupled_weight_decay}: expected at least 0")
    now, weight = (1.0, momentum) if nesterov else (1 - momentum_share, momentum_share)
    gain = 1 - dampening if momentum else 1.0
    return LinearMode(momentum, gain, 1 - lr * decoupled_weight_decay, now, weight)
