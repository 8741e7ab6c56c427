r"""A model whose global minima form a curve on which sharper minima test better, with a proof.

**Model.** :math:`f(x) = p\,x_1 + q^2 x_2` with weights p and q. The truth is :math:`y = x_2`, which is
p = 0, q = 1. Test inputs are standard normal in both coordinates, but the n training inputs are
:math:`x_i = \alpha_i (1, 1)`, so that :math:`y_i = \alpha_i`, and determine only :math:`p + q^2`. With
the mean squared error, :math:`m_k = \tfrac1n\sum_i\alpha_i^k`, and :math:`r = p + q^2 - 1`,

.. math:: L = m_2 r^2, \qquad \text{global minima}: \; p = 1 - q^2.

**Curvature.** At a minimum r = 0, so :math:`H_i = 2\alpha_i^2\,u u^\top` with
:math:`u = \nabla r = (1, 2q)`. All :math:`H_i` are multiples of one matrix, and

.. math:: a = 2 m_2 (1 + 4q^2), \qquad s = 2\sqrt{m_4 - m_2^2}\,(1 + 4q^2).

**Test error.** On independent standard normal coordinates
:math:`R = E\,(p x_1 + (q^2 - 1) x_2)^2 = p^2 + (1 - q^2)^2`, which on the curve is
:math:`2(1 - q^2)^2`.

**Anticorrelation.** Eliminating :math:`q^2 = (a/2m_2 - 1)/4`,

.. math:: R(a) = 2\left(\frac{10\,m_2 - a}{8\,m_2}\right)^2, \qquad 2m_2 \le a \le 10\,m_2,

with :math:`R'(a) = -(10 m_2 - a)/(16 m_2^2) < 0` below the right end: of any two minima with :math:`0
\le q^2 \le 1` the flatter one tests worse. The truth is the sharpest, with R = 0. The flattest, q = 0,
uses only the wrong coordinate and is the worst, with R = 2.

**Selection.** Minima with a > 2/η are unstable under GD, and under SGD with batches of B those with
:math:`\eta > 2a/(a^2 + ps^2)`. Since :math:`s/a = \sqrt{m_4 - m_2^2}/m_2` is constant on the curve,
these are the minima with :math:`a > (2/\eta)/(1 + p\,s^2/a^2)`. So a larger learning rate, or a
smaller batch, selects a flatter minimum, which tests worse. With the truth y = x₁ it would test
better: flatness alone does not determine the test error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.measured import BOTH
from stableopt.stability import noise_factor

__all__ = ["Curve", "Descent", "Measured", "Model", "scales"]


def scales(n: int, contrast: float) -> Tensor:
    """Return n values of α whose squares alternate between 1 − contrast and 1 + contrast; n is even.

    >>> [round(square, 9) for square in scales(4, 0.75).square().tolist()]
    [0.25, 1.75, 0.25, 1.75]
    """
    squares = torch.ones(n, dtype=torch.float64)
    squares[::2] -= contrast
    squares[1::2] += contrast
    return squares.sqrt()


class Model(nn.Module):
    """f(x) = p x₁ + q² x₂ in double precision, from ``(n, 2)`` to ``(n, 1)``."""

    def __init__(self, p: float, q: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p, dtype=torch.float64))
        self.q = nn.Parameter(torch.tensor(q, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return (self.p * x[:, :1] + self.q**2 * x[:, 1:]).reshape(-1, 1)


@dataclass(frozen=True)
class Curve:
    """Closed forms along the curve of minima.

    Attributes:
        n: number of training samples.
        contrast: the ratio s/a, constant along the curve; see :func:`scales`.

    >>> curve = Curve(10, 0.9)
    >>> curve.sharpness(1.0), curve.risk(1.0), curve.sharpness(0.0), curve.risk(0.0)
    (10.0, 0.0, 2.0, 2.0)
    """

    n: int
    contrast: float

    def sharpness(self, q: float) -> float:
        """Sharpness a at the minimum with this q."""
        return 2 * (1 + 4 * q**2)

    def risk(self, q: float) -> float:
        """Expected squared error on test inputs, at the minimum with this q."""
        return 2 * (1 - q**2) ** 2

    def risk_at(self, sharpness: Any) -> Any:
        """Expected squared error at the minimum of this sharpness, a number or an array."""
        return 2 * ((10 - sharpness) / 8) ** 2

    def limit(self, lr: float, batch_size: int | None) -> float:
        """Return the sharpness up to which a minimum is stable in mean square."""
        p = noise_factor(batch_size or self.n, self.n)
        return 2 / lr / (1 + p * self.contrast**2)

    def data(self) -> tuple[Tensor, Tensor]:
        """Return training inputs and targets."""
        alpha = scales(self.n, self.contrast)[:, None]
        return alpha.expand(-1, 2).contiguous(), alpha


def measure_minimum(
    curve: Curve, model: Model, lr: float, batch_size: int | None
) -> dict[str, Any]:
    """Return the weights, loss, test error, and measured sharpness and non-uniformity."""
    x, y = curve.data()
    margins = stableopt.measure(
        model,
        nn.MSELoss(),
        (x, y),
        lr=lr,
        batch_size=batch_size or curve.n,
        quantities=BOTH,
        tol=1e-10,
    )
    p, q = float(model.p.detach()), float(model.q.detach())
    return {
        "p": p,
        "q": q,
        "loss": float(nn.functional.mse_loss(model(x), y).detach()),
        "risk": p**2 + (1 - q**2) ** 2,
        "sharpness": margins.sharpness,
        "non_uniformity": margins.non_uniformity,
    }


@dataclass(frozen=True)
class Measured(Job):
    """Measurements along the curve of minima, for comparison with the closed forms.

    Attributes:
        n: number of training samples.
        contrast: see :func:`scales`.
        points: number of points from q = 0 to q = 1.
    """

    kind = "counterexample-curve"

    n: int = 10
    contrast: float = 0.9
    points: int = 21

    def run(self, work: Work) -> dict[str, Any]:
        """Measure."""
        curve = Curve(self.n, self.contrast)
        squares = [k / (self.points - 1) for k in range(self.points)]
        return {
            "points": [
                measure_minimum(curve, Model(1 - q2, math.sqrt(q2)), 0.1, None) for q2 in squares
            ]
        }


@dataclass(frozen=True)
class Descent(Job):
    """GD or SGD from near the truth until the loss is small.

    Attributes:
        lr: learning rate.
        batch_size: size of SGD's batches, drawn independently without replacement; ``None`` for GD.
        seed: seed of the start and of the batches.
        n: number of training samples.
        contrast: see :func:`scales`.
        spread: at the start, p is normal with this standard deviation, and 1 − q is half-normal.
        steps: largest number of steps.
        target_loss: training loss at which it stops.

    The result has ``outcome`` (``"reached"``, ``"out of steps"`` or ``"diverged"``), ``steps``, and,
    unless it diverged, the measurements of :func:`measure_minimum` at the end.
    """

    kind = "counterexample-descent"

    lr: float
    batch_size: int | None = None
    seed: int = 0
    n: int = 10
    contrast: float = 0.9
    spread: float = 0.05
    steps: int = 5000
    target_loss: float = 1e-20

    def run(self, work: Work) -> dict[str, Any]:
        """Train, measure."""
        curve = Curve(self.n, self.contrast)
        generator = torch.Generator().manual_seed(self.seed)
        p, q = (self.spread * torch.randn(2, generator=generator, dtype=torch.float64)).tolist()
        model = Model(p, 1 - abs(q))
        optimizer = stableopt.SGD(model.parameters(), lr=self.lr)
        x, y = curve.data()
        outcome, step = "out of steps", 0
        for step in range(self.steps + 1):
            rows = torch.randperm(self.n, generator=generator)[: self.batch_size]
            optimizer.zero_grad()
            squares = (model(x) - y) ** 2
            loss = float(squares.mean().detach())
            if not loss < math.inf:
                return {"outcome": "diverged", "steps": step}
            if loss <= self.target_loss:
                outcome = "reached"
                break
            squares[rows].mean().backward()
            optimizer.step()
        return {
            "outcome": outcome,
            "steps": step,
            **measure_minimum(curve, model, self.lr, self.batch_size),
        }
