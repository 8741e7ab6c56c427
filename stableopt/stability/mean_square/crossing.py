r"""`first_crossing`: the parameter at which a growing noise gain passes 1.

The largest eigenvalue of a noise gain
(:class:`~stableopt.stability.mean_square.second_moments.NoiseGain`) grows with the learning rate and
with the noise; a point is stable if it is at most 1. The Rayleigh quotient of *any* S passes 1 no
earlier than the eigenvalue. Eigen-solves therefore alternate with the scalar root of the quotient at
the eigenvector, which converges quadratically from above. Any positive definite S gives a bound from
below, so the result is a bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.curvature import top_eigenpair
from stableopt.curvature.gram.gram import Modes
from stableopt.stability.mean_square.second_moments import NoiseGain, gather

__all__ = ["Crossing", "Family", "first_crossing", "root"]

_FIRST_TOLS = (0.03, 1e-3)
"""Tolerances of the first eigen-solves: the root after each squares its error."""

_EXACT = 1e-13
"""Relative accuracy of scalar roots, above the rounding error of their sums."""

_POWERS, _RETREATS = 4, 3
"""Products for the lower bound: to improve its S, and to lower t until the bound holds."""

_FLOOR = 1e-12
"""Share of the identity in the S of the lower bound, which must be positive definite."""

_FURTHER = 1.1

_CLOSE = 1e-3
"""Relative width of a bracket that needs no more products."""

_FAR = 1e100


@dataclass(frozen=True)
class Family:
    """Noise gains that grow with a parameter t: the learning rate, or the noise itself.

    Attributes:
        modes: the samples' curvature.
        weights: ``(t, h_a, h_b) -> V`` for tensors of eigenvalues that broadcast.
        noise: ``t -> p``, positive for positive t.
        most: the largest t to consider.
    """

    modes: Modes
    weights: Callable[[float, Tensor, Tensor], Tensor]
    noise: Callable[[float], float]
    most: float

    def at(self, t: float) -> NoiseGain:
        """Return the gain at t."""
        return NoiseGain(self.modes, self._matrix(t), self.noise(t))

    def _matrix(self, t: float) -> Tensor:
        h = self.modes.eigenvalues
        return self.weights(t, h.unsqueeze(1), h)

    def crossing_of(self, vector: Tensor, gathered: Tensor, most: float) -> float:
        """Return the t at which the Rayleigh quotient of S passes 1, at most ``most``.

        ``gathered`` is :func:`gather` of ``vector``.
        """
        n, square, norm = self.modes.factors.shape[0], gathered**2, float(vector.norm())
        return root(
            lambda t: self.noise(t) / n * float((square / self._matrix(t)).sum()) / norm**2, most
        )

    def bound_by_identity(self, t: float) -> float:
        """Return the upper bound on the largest eigenvalue from S = I, which needs no product."""
        h, factors = self.modes.eigenvalues, self.modes.factors
        weighted = factors * (h / self.weights(t, h, h))
        return self.noise(t) * float(torch.linalg.eigvalsh(weighted @ factors.mT)[:, -1].max())


@dataclass(frozen=True)
class Crossing:
    """The crossing of a family, with its accuracy.

    Attributes:
        value: the t of the crossing, an upper bound up to rounding; the family's ``most`` if it
            crosses nowhere below.
        lower: a t that is certainly below the crossing.
        residual: residual of the last eigen-solve, relative to the eigenvalue.
        products: products with noise gains.
        converged: whether the last eigen-solve and the alternation reached the tolerance.
    """

    value: float
    lower: float
    residual: float
    products: int
    converged: bool


def first_crossing(family: Family, *, tol: float, max_iter: int, seed: int) -> Crossing:
    """Return the t at which the family's largest eigenvalue passes 1.

    Args:
        family: the gains, with at least one mode.
        tol: the largest relative residual of the eigen-solve at the crossing; the crossing's own
            error is about its square.
        max_iter: the largest number of products.
        seed: seed of the eigen-solver.
    """
    n, outputs, _ = family.modes.factors.shape
    device = family.modes.factors.device
    identity = torch.eye(outputs, dtype=torch.float64, device=device).repeat(n, 1, 1).flatten()
    lower = root(family.bound_by_identity, family.most)
    vector = identity
    value = family.crossing_of(vector, n * torch.diag(family.modes.eigenvalues), family.most)
    products, rounds, residual, converged = 0, 0, math.inf, lower >= family.most
    while not converged and products < max_iter:
        wanted = max(tol, _FIRST_TOLS[rounds]) if rounds < len(_FIRST_TOLS) else tol
        pair = top_eigenpair(
            family.at(value),
            start=vector,
            tol=wanted,
            max_iter=max_iter - products,
            seed=seed + rounds,
        )
        products, rounds = products + pair.products, rounds + 1
        residual = pair.relative_residual
        vector = _symmetric(pair.vector, n)
        before = value
        value = family.crossing_of(vector, gather(family.modes.factors, vector), before)
        converged = pair.converged and wanted == tol and before - value <= tol * before
    if products:
        lower = max(lower, _lower(family, vector, value))
    return Crossing(value, min(lower, value), residual, products, converged)


def _symmetric(vector: Tensor, n: int) -> Tensor:
    """Return the eigenvector as positive matrices, with rounding errors and sign removed."""
    size = math.isqrt(vector.numel() // n)
    matrices = vector.view(n, size, size)
    matrices = (matrices + matrices.mT) / 2
    trace = matrices.diagonal(dim1=1, dim2=2).sum()
    return (matrices * torch.where(trace < 0, -1.0, 1.0)).flatten()


def _lower(family: Family, vector: Tensor, value: float) -> float:
    """Return a t below ``value`` at which the gain of some S is at most S, or 0.

    Small entries of an eigenvector have the errors of the large ones. Powers of the gain correct them,
    since they compute every entry from the large ones; then t is lowered until the bound holds.
    """
    factors, t = family.modes.factors, value
    gain = family.at(t)
    matrices = vector.view(factors.shape[0], factors.shape[1], -1)
    for attempt in range(_POWERS + _RETREATS):
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        values = values.clamp(min=0) + _FLOOR * values.max()
        matrices = (vectors * values.unsqueeze(1)) @ vectors.mT
        inverse_root = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
        gained = gain.product(matrices.flatten()).view_as(matrices)
        bound = float(torch.linalg.eigvalsh(inverse_root @ gained @ inverse_root)[:, -1].max())
        if bound <= 1 + _EXACT:
            return t
        if bound <= 1 + _CLOSE or attempt >= _POWERS:
            # A little further than for a gain that is proportional to t.
            t /= 1 + _FURTHER * (bound - 1)
            gain = family.at(t)
        matrices = gained / gained.norm()
    return 0.0


def root(growing: Callable[[float], float], most: float) -> float:
    """Return the t at which ``growing`` passes 1, at most ``most``.

    The method is the Illinois variant of the secant method, applied to the reciprocal as a function of
    1/t, which is nearly linear.
    """

    def excess(x: float) -> float:
        found = growing(1 / x)
        return 1 / found - 1 if found > 0 else math.inf

    low, at_low = 1 / most, excess(1 / most)
    if at_low >= 0:
        return most
    high, at_high = 2 * low, excess(2 * low)
    while at_high < 0 and high < _FAR / most:
        low, at_low, high, at_high = high, at_high, 2 * high, excess(2 * high)
    side = 0
    for _ in range(100):
        x = (low * at_high - high * at_low) / (at_high - at_low)
        if not low < x < high:
            x = (low + high) / 2
        found = excess(x)
        if abs(found) <= _EXACT or high - low <= _EXACT * high:
            return 1 / x
        if found < 0:
            low, at_low = x, found
            at_high = at_high / 2 if side < 0 else at_high
            side = -1
        else:
            high, at_high = x, found
            at_low = at_low / 2 if side > 0 else at_low
            side = 1
    return 1 / low
