r"""`first_crossing`: the parameter at which a growing noise gain passes 1.

The largest eigenvalue of a noise gain
(:class:`~stableopt.stability.mean_square.second_moments.NoiseGain`) grows with the learning rate and
with the noise; a point is stable if it is at most 1. The Rayleigh quotient of *any* S passes 1 no
earlier than the eigenvalue. Eigen-solves therefore alternate with the scalar root of the quotient at
the eigenvector, which converges quadratically from above. Any positive definite S gives a bound from
below, so the result is a bracket.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt.curvature import Operator, top_eigenpair
from stableopt.curvature.gram.gram import Modes
from stableopt.stability.mean_square.second_moments import (
    HessianModes,
    MomentGain,
    NoiseGain,
    gather,
    sandwich,
)

__all__ = ["BlockFamily", "Crossing", "FactorFamily", "Family", "Weights", "first_crossing", "root"]

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


class Family(abc.ABC):
    """Noise gains that grow with a parameter t: the learning rate, or the noise itself.

    Attributes:
        most: the largest t to consider.
    """

    most: float

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Rows of each matrix S."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where the matrices are."""

    @abc.abstractmethod
    def identity(self) -> Tensor:
        """Return S = I, ``(blocks, size, size)``."""

    @abc.abstractmethod
    def at(self, t: float) -> Operator:
        """Return the gain at t as a symmetric operator."""

    def to_vector(self, matrices: Tensor, t: float) -> Tensor:
        """Return the operator's vector of the matrices S."""
        return matrices.flatten()

    def from_vector(self, vector: Tensor, t: float) -> Tensor:
        """Return the matrices S of the operator's vector: the inverse of :meth:`to_vector`."""
        return vector.view(-1, self.size, self.size)

    @abc.abstractmethod
    def gained(self, matrices: Tensor, t: float) -> Tensor:
        """Return the gain of S at t, which is positive semi-definite where S is."""

    @abc.abstractmethod
    def crossing_of(self, matrices: Tensor, most: float) -> float:
        """Return the t at which the Rayleigh quotient of S passes 1, at most ``most``."""

    @abc.abstractmethod
    def bound_by_identity(self, t: float) -> float:
        """Return the upper bound on the largest eigenvalue from S = I."""


Weights = Callable[[float, Tensor, Tensor], Tensor]
"""``(t, h_a, h_b) -> V`` for tensors of eigenvalues that broadcast."""


@dataclass(frozen=True)
class FactorFamily(Family):
    """The gains of Gauss–Newton matrices: S is one C x C matrix for each sample.

    Attributes:
        modes: the samples' curvature.
        weights: V.
        noise: ``t -> p``, positive for positive t.
        most: the largest t to consider.
        spill: what is added to V for modes that are not exact, ``(r, r)``, or 0.
    """

    modes: Modes
    weights: Weights
    noise: Callable[[float], float]
    most: float
    spill: Tensor | float = 0.0

    @property
    def size(self) -> int:
        """Outputs C of a sample."""
        return int(self.modes.factors.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.modes.factors.device

    def identity(self) -> Tensor:
        """Return one identity for each sample."""
        n, outputs, _ = self.modes.factors.shape
        return torch.eye(outputs, dtype=torch.float64, device=self.device).repeat(n, 1, 1)

    def at(self, t: float) -> NoiseGain:
        """Return the gain at t."""
        return NoiseGain(self.modes, self._matrix(t), self.noise(t))

    def _matrix(self, t: float) -> Tensor:
        h = self.modes.eigenvalues
        return self.weights(t, h.unsqueeze(1), h) + self.spill

    def gained(self, matrices: Tensor, t: float) -> Tensor:
        """Return the gain of S."""
        return self.at(t).product(matrices.flatten()).view_as(matrices)

    def crossing_of(self, matrices: Tensor, most: float) -> float:
        """Return the t at which the Rayleigh quotient of S passes 1, at most ``most``."""
        n, norm = self.modes.factors.shape[0], float(matrices.norm())
        square = gather(self.modes.factors, matrices.flatten()) ** 2
        return root(
            lambda t: self.noise(t) / n * float((square / self._matrix(t)).sum()) / norm**2, most
        )

    def bound_by_identity(self, t: float) -> float:
        """Return the bound from S = I, which needs no product."""
        h, factors = self.modes.eigenvalues, self.modes.factors
        weighted = factors * (h / self.weights(t, h, h))
        return self.noise(t) * float(torch.linalg.eigvalsh(weighted @ factors.mT)[:, -1].max())


@dataclass(frozen=True)
class BlockFamily(Family):
    """The gains of Hessians, which may be indefinite: S is the second moment X itself.

    The attributes are those of :class:`FactorFamily`.
    """

    modes: HessianModes
    weights: Weights
    noise: Callable[[float], float]
    most: float
    spill: Tensor | float = 0.0

    @property
    def size(self) -> int:
        """The number of modes."""
        return len(self.modes.eigenvalues)

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.modes.blocks.device

    def identity(self) -> Tensor:
        """Return the identity over the modes."""
        return torch.eye(self.size, dtype=torch.float64, device=self.device).unsqueeze(0)

    def at(self, t: float) -> MomentGain:
        """Return the gain at t."""
        return MomentGain(self.modes.blocks, self._matrix(t), self.noise(t))

    def _matrix(self, t: float) -> Tensor:
        h = self.modes.eigenvalues
        return self.weights(t, h.unsqueeze(1), h) + self.spill

    def to_vector(self, matrices: Tensor, t: float) -> Tensor:
        """Return Y = V^(1/2) X, entry by entry."""
        return (matrices * self._matrix(t).sqrt()).flatten()

    def from_vector(self, vector: Tensor, t: float) -> Tensor:
        """Return X = Y / V^(1/2)."""
        return vector.view(-1, self.size, self.size) * self._matrix(t).rsqrt()

    def gained(self, matrices: Tensor, t: float) -> Tensor:
        """Return the noise of X over V."""
        moved = sandwich(self.modes.blocks, matrices[0])
        return (self.noise(t) * moved / self._matrix(t)).unsqueeze(0)

    def crossing_of(self, matrices: Tensor, most: float) -> float:
        """Return the t at which the quotient of X's noise and contraction passes 1."""
        x = matrices[0]
        replaced = float((x * sandwich(self.modes.blocks, x)).sum())
        # Noise that takes from this X on the whole never outweighs the contraction.
        return root(
            lambda t: self.noise(t) * replaced / float((x**2 * self._matrix(t)).sum()), most
        )

    def bound_by_identity(self, t: float) -> float:
        """Return the bound from X = I."""
        gained = self.gained(self.identity(), t)
        return float(torch.linalg.eigvalsh((gained + gained.mT) / 2).max())


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
    lower = root(family.bound_by_identity, family.most)
    matrices = family.identity()
    value = family.crossing_of(matrices, family.most)
    products, rounds, residual, converged = 0, 0, math.inf, lower >= family.most
    while not converged and products < max_iter:
        wanted = max(tol, _FIRST_TOLS[rounds]) if rounds < len(_FIRST_TOLS) else tol
        pair = top_eigenpair(
            family.at(value),
            start=family.to_vector(matrices, value),
            tol=wanted,
            max_iter=max_iter - products,
            seed=seed + rounds,
        )
        products, rounds = products + pair.products, rounds + 1
        residual = pair.relative_residual
        matrices = _symmetric(family.from_vector(pair.vector, value))
        before = value
        value = family.crossing_of(matrices, before)
        converged = pair.converged and wanted == tol and before - value <= tol * before
    if products:
        lower = max(lower, _lower(family, matrices, value))
    return Crossing(value, min(lower, value), residual, products, converged)


def _symmetric(matrices: Tensor) -> Tensor:
    """Return the eigenvector as positive matrices, with rounding errors and sign removed."""
    matrices = (matrices + matrices.mT) / 2
    trace = matrices.diagonal(dim1=1, dim2=2).sum()
    return matrices * torch.where(trace < 0, -1.0, 1.0)


def _lower(family: Family, matrices: Tensor, value: float) -> float:
    """Return a t below ``value`` at which the gain of some S is at most S, or 0.

    Small entries of an eigenvector have the errors of the large ones. Powers of the gain correct them,
    since they compute every entry from the large ones; then t is lowered until the bound holds.
    """
    t = value
    for attempt in range(_POWERS + _RETREATS):
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        values = values.clamp(min=0) + _FLOOR * values.max()
        matrices = (vectors * values.unsqueeze(1)) @ vectors.mT
        inverse_root = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
        gained = family.gained(matrices, t)
        bound = float(torch.linalg.eigvalsh(inverse_root @ gained @ inverse_root)[:, -1].max())
        if bound <= 1 + _EXACT:
            return t
        if bound <= 1 + _CLOSE or attempt >= _POWERS:
            # A little further than for a gain that is proportional to t.
            t /= 1 + _FURTHER * (bound - 1)
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
