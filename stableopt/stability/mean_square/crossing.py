r"""`first_crossing`: the learning rate, or noise, at which a noise gain's largest eigenvalue passes 1.

The largest eigenvalue of a noise gain
(:class:`~stableopt.stability.mean_square.second_moments.NoiseGain`) grows with the learning rate and
with the noise, and a point is stable if it is at most 1. The search alternates two steps: an
eigen-solve, and the scalar root t at which the eigenvector's Rayleigh quotient is 1. A Rayleigh
quotient never exceeds the eigenvalue, so the roots converge to the crossing from above, quadratically.
Any positive definite S gives a lower bound, so the result is a bracket.
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
"""Tolerances of the first eigen-solves: the root search after each squares its error."""

_EXACT = 1e-13
"""Relative accuracy of scalar roots, just above the rounding error of their sums."""

_POWERS, _RETREATS = 4, 3
"""Products for the lower bound: power iterations on S, then reductions of t until the bound holds."""

_FLOOR = 1e-12
"""Share of the identity in the S of the lower bound, which keeps it positive definite."""

_RETREAT_FACTOR = 1.1
"""Reduction of t, relative to the one that suffices for a gain proportional to t."""

_CLOSE = 1e-3
"""Relative width of a bracket that needs no more power iterations."""

_FAR = 1e100
"""Factor below the largest t at which the search for a crossing ends."""


Weights = Callable[[float, Tensor, Tensor], Tensor]
"""``(t, h_a, h_b) -> V``, for tensors of eigenvalues that broadcast."""


@dataclass(frozen=True)
class Family(abc.ABC):
    """Noise gains that grow with a parameter t: the learning rate, or the noise itself.

    Attributes:
        modes: the samples' curvature.
        weights: V.
        noise: ``t -> p``, positive for positive t.
        t_max: the largest t to consider.
        correction: the correction of V for modes that are not exact, ``(r, r)``, or 0.
    """

    modes: Modes | HessianModes
    weights: Weights
    noise: Callable[[float], float]
    t_max: float
    correction: Tensor | float = 0.0

    def weight_matrix(self, t: float) -> Tensor:
        """Return V with its correction, ``(r, r)``."""
        h = self.modes.eigenvalues
        return self.weights(t, h.unsqueeze(1), h) + self.correction

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Rows of each matrix S."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of the matrices."""

    @abc.abstractmethod
    def identity(self) -> Tensor:
        """Return S = I, ``(blocks, size, size)``."""

    @abc.abstractmethod
    def operator(self, t: float) -> Operator:
        """Return the gain at t as a symmetric operator."""

    def to_vector(self, matrices: Tensor, t: float) -> Tensor:
        """Return the operator's vector of the matrices S."""
        return matrices.flatten()

    def from_vector(self, vector: Tensor, t: float) -> Tensor:
        """Return the matrices S of the operator's vector: the inverse of :meth:`to_vector`."""
        return vector.view(-1, self.size, self.size)

    @abc.abstractmethod
    def apply(self, matrices: Tensor, t: float) -> Tensor:
        """Return the gain of S at t, positive semi-definite where S is."""

    @abc.abstractmethod
    def quotient_crossing(self, matrices: Tensor, t_max: float) -> float:
        """Return the t at which the Rayleigh quotient of S passes 1, at most ``t_max``."""

    @abc.abstractmethod
    def identity_bound(self, t: float) -> float:
        """Return the upper bound on the largest eigenvalue from S = I."""


@dataclass(frozen=True)
class FactorFamily(Family):
    """Gains of Gauss–Newton matrices: S is one C x C matrix per sample."""

    modes: Modes

    @property
    def size(self) -> int:
        """Outputs C of a sample."""
        return int(self.modes.factors.shape[1])

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.modes.factors.device

    def identity(self) -> Tensor:
        """Return one identity matrix per sample."""
        n, outputs, _ = self.modes.factors.shape
        return torch.eye(outputs, dtype=torch.float64, device=self.device).repeat(n, 1, 1)

    def operator(self, t: float) -> NoiseGain:
        """Return the gain at t."""
        return NoiseGain(self.modes, self.weight_matrix(t), self.noise(t))

    def apply(self, matrices: Tensor, t: float) -> Tensor:
        """Return the gain of S."""
        return self.operator(t).product(matrices.flatten()).view_as(matrices)

    def quotient_crossing(self, matrices: Tensor, t_max: float) -> float:
        """Return the t at which the Rayleigh quotient of S passes 1, at most ``t_max``."""
        n, norm = self.modes.factors.shape[0], float(matrices.norm())
        squares = gather(self.modes.factors, matrices.flatten()) ** 2

        def quotient(t: float) -> float:
            return self.noise(t) / n * float((squares / self.weight_matrix(t)).sum()) / norm**2

        return root(quotient, t_max)

    def identity_bound(self, t: float) -> float:
        """Return the bound from S = I, which needs no product."""
        h, factors = self.modes.eigenvalues, self.modes.factors
        weighted = factors * (h / self.weights(t, h, h))
        return self.noise(t) * float(torch.linalg.eigvalsh(weighted @ factors.mT)[:, -1].max())


@dataclass(frozen=True)
class BlockFamily(Family):
    """Gains of Hessians, which may be indefinite: S is the second moment X itself."""

    modes: HessianModes

    @property
    def size(self) -> int:
        """The number of modes."""
        return len(self.modes.eigenvalues)

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        return self.modes.blocks.device

    def identity(self) -> Tensor:
        """Return the identity over the modes."""
        return torch.eye(self.size, dtype=torch.float64, device=self.device).unsqueeze(0)

    def operator(self, t: float) -> MomentGain:
        """Return the gain at t."""
        return MomentGain(self.modes.blocks, self.weight_matrix(t), self.noise(t))

    def to_vector(self, matrices: Tensor, t: float) -> Tensor:
        """Return Y = V^(1/2) X, entry by entry."""
        return (matrices * self.weight_matrix(t).sqrt()).flatten()

    def from_vector(self, vector: Tensor, t: float) -> Tensor:
        """Return X = Y / V^(1/2)."""
        return vector.view(-1, self.size, self.size) * self.weight_matrix(t).rsqrt()

    def apply(self, matrices: Tensor, t: float) -> Tensor:
        """Return the noise of X, divided by V."""
        image = sandwich(self.modes.blocks, matrices[0])
        return (self.noise(t) * image / self.weight_matrix(t)).unsqueeze(0)

    def quotient_crossing(self, matrices: Tensor, t_max: float) -> float:
        """Return the t at which the quotient of X's noise and contraction passes 1."""
        x = matrices[0]
        # The product with X may be negative: then the quotient never passes 1.
        product = float((x * sandwich(self.modes.blocks, x)).sum())

        def quotient(t: float) -> float:
            return self.noise(t) * product / float((x**2 * self.weight_matrix(t)).sum())

        return root(quotient, t_max)

    def identity_bound(self, t: float) -> float:
        """Return the bound from X = I."""
        image = self.apply(self.identity(), t)
        return float(torch.linalg.eigvalsh((image + image.mT) / 2).max())


@dataclass(frozen=True)
class Crossing:
    """The crossing of a family, with its accuracy.

    Attributes:
        value: the t of the crossing, an upper bound up to rounding; the family's ``t_max`` without a
            crossing below it.
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
    lower = root(family.identity_bound, family.t_max)
    matrices = family.identity()
    value = family.quotient_crossing(matrices, family.t_max)
    converged = lower >= family.t_max
    products, rounds, residual = 0, 0, 0.0 if converged else math.inf
    while not converged and products < max_iter:
        solve_tol = max(tol, _FIRST_TOLS[rounds]) if rounds < len(_FIRST_TOLS) else tol
        pair = top_eigenpair(
            family.operator(value),
            start=family.to_vector(matrices, value),
            tol=solve_tol,
            max_iter=max_iter - products,
            seed=seed + rounds,
        )
        products += pair.products
        rounds += 1
        residual = pair.relative_residual
        matrices = _oriented(family.from_vector(pair.vector, value))
        previous = value
        value = family.quotient_crossing(matrices, previous)
        converged = pair.converged and solve_tol == tol and previous - value <= tol * previous
    if products:
        lower = max(lower, _lower_bound(family, matrices, value))
    return Crossing(value, min(lower, value), residual, products, converged)


def _oriented(matrices: Tensor) -> Tensor:
    """Return the eigenvector as symmetric matrices, with the sign that makes their trace positive."""
    matrices = (matrices + matrices.mT) / 2
    trace = matrices.diagonal(dim1=1, dim2=2).sum()
    return matrices * torch.where(trace < 0, -1.0, 1.0)


def _lower_bound(family: Family, matrices: Tensor, value: float) -> float:
    """Return a t up to ``value`` at which the gain of some S is at most S, or 0.

    An eigenvector's absolute error hides its small entries. Power iterations correct them, since they
    compute every entry from the large ones. Then t is lowered until the bound holds.
    """
    t = value
    for attempt in range(_POWERS + _RETREATS):
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        values = values.clamp(min=0) + _FLOOR * values.max()
        matrices = (vectors * values.unsqueeze(1)) @ vectors.mT
        inverse_root = (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT
        image = family.apply(matrices, t)
        bound = float(torch.linalg.eigvalsh(inverse_root @ image @ inverse_root)[:, -1].max())
        if bound <= 1 + _EXACT:
            return t
        if bound <= 1 + _CLOSE or attempt >= _POWERS:
            t /= 1 + _RETREAT_FACTOR * (bound - 1)
        matrices = image / image.norm()
    return 0.0


def root(growing: Callable[[float], float], t_max: float) -> float:
    """Return the t at which ``growing`` passes 1, at most ``t_max``.

    The method is the Illinois variant of regula falsi, applied to 1 / growing as a function of x = 1/t,
    which is nearly linear.
    """

    def excess(x: float) -> float:
        value = growing(1 / x)
        return 1 / value - 1 if value > 0 else math.inf

    low = 1 / t_max
    excess_low = excess(low)
    if excess_low >= 0:
        return t_max
    high = 2 * low
    excess_high = excess(high)
    while excess_high < 0 and high < _FAR / t_max:
        low, excess_low = high, excess_high
        high = 2 * high
        excess_high = excess(high)
    replaced = ""
    for _ in range(100):
        x = (low * excess_high - high * excess_low) / (excess_high - excess_low)
        if not low < x < high:
            x = (low + high) / 2
        excess_x = excess(x)
        if abs(excess_x) <= _EXACT or high - low <= _EXACT * high:
            return 1 / x
        # Halve the value of an end that stays for a second time.
        if excess_x < 0:
            low, excess_low = x, excess_x
            if replaced == "low":
                excess_high /= 2
            replaced = "low"
        else:
            high, excess_high = x, excess_x
            if replaced == "high":
                excess_low /= 2
            replaced = "high"
    return 1 / low
