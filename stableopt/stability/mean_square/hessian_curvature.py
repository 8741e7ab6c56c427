r"""`HessianCurvature`: the samples' own Hessians, for points at which samples are not fitted.

There the Gauss–Newton matrices of :mod:`~stableopt.stability.mean_square.sample_curvature` are not the
Hessians, which may be indefinite. With few parameters all their entries are used, and the threshold is
exact. With more, second moments are restricted to the leading directions of H and of the samples'
differences, which bounds the threshold from above; a condition on all directions bounds it from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature import Hessian, NonUniformity, Operator, Problem, top_eigenpair
from stableopt.curvature.per_sample.blocks import hessian_blocks
from stableopt.stability.mean_square.crossing import BlockFamily, Crossing, Weights, root
from stableopt.stability.mean_square.leading import leading_directions
from stableopt.stability.mean_square.second_moments import HessianModes, mode_weights, spills
from stableopt.stability.rules.limits import LinearStep

__all__ = ["MAX_PARAMETERS", "HessianCurvature", "Negated", "few_entries", "leaves"]

MAX_PARAMETERS = 64
"""Parameters up to which all entries of the samples' Hessians are used: a product with second moments
takes 4 n d^3 operations."""

MAX_DENSE = 256
"""Parameters up to which the lower bound uses the dense mean square of the Hessians: 2d products."""

_ENTRIES = 2**25
"""Entries of the samples' Hessians up to which all are used: 256 MiB."""

_ROUNDING = 10
"""Rounding errors of a Hessian's entry, in units of the precision times its largest eigenvalue."""

_TOL = 1e-3
"""Relative residual of the eigen-solves whose upper bounds certify a learning rate."""


class Negated(Operator):
    """-A, whose largest eigenvalue is A's smallest, negated."""

    def __init__(self, of: Hessian) -> None:
        super().__init__(of.shape[0], of.dtype, of.device)
        self.inner_product, self._of = of.inner_product, of

    def product(self, vector: Tensor) -> Tensor:
        """Return -A times ``vector``."""
        return -(self._of @ vector)


class _MeanSquare(Operator):
    r""":math:`H^2 + p\Sigma`, for H with weight decay: the second moment of a batch's Hessian."""

    def __init__(self, hessian: Hessian, spread: NonUniformity, noise: float, decay: float) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device)
        self.inner_product = hessian.inner_product
        self._hessian, self._spread, self._noise, self._decay = hessian, spread, noise, decay

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector``."""
        once = self._hessian @ vector + self._decay * vector
        twice = self._hessian @ once + self._decay * once
        return twice + self._noise * (self._spread @ vector) if self._noise else twice


@dataclass(frozen=True)
class HessianCurvature:
    """Modes of the mean Hessian with positive curvature, and what is known of all directions.

    Attributes:
        problem: the problem, without weight decay.
        weight_decay: what is added to every sample's curvature.
        modes: the modes, with the weight decay.
        sharpness: the largest eigenvalue of the mean, without weight decay; never above it.
        exact: whether these are all directions of positive curvature.
        dense: what is known of all directions together; ``None`` with too many.
        least: the least curvature known, with the weight decay, if it is negative; else 0.
        seed: seed of the eigen-solvers.
    """

    problem: Problem
    weight_decay: float
    modes: HessianModes
    sharpness: float
    exact: bool
    dense: _AllDirections | None
    least: float
    seed: int

    hessians = "true"

    @classmethod
    def from_problem(
        cls, problem: Problem, *, weight_decay: float, directions: int, seed: int
    ) -> HessianCurvature:
        """Return all modes of a small problem, else leading ones: ``directions`` of each kind."""
        problem = problem.without_weight_decay()
        d = problem.num_params
        eye = torch.eye(d, dtype=problem.dtype, device=problem.device) if d <= MAX_DENSE else None
        if eye is not None and few_entries(problem):
            blocks = hessian_blocks(problem, eye)
            blocks = blocks + weight_decay * torch.eye(d).to(blocks)
            return cls._from_blocks(problem, blocks, weight_decay, seed)
        hessian, spread = Hessian(problem), NonUniformity(problem)
        basis = leading_directions([hessian, spread], min(directions, d), seed=seed)
        modes, least, top = _restricted(hessian, basis, weight_decay)
        dense = None
        if eye is not None:
            mean = (hessian @ eye).double() + weight_decay * eye.double()
            dense = _AllDirections.of(mean, mean @ mean + (spread @ eye).double(), problem.dtype)
            least = dense.least
        else:
            lowest = -top_eigenpair(Negated(hessian), tol=_TOL, seed=seed).value
            # A Rayleigh quotient below zero is a proof, however well the search has converged.
            least = min(least, lowest + weight_decay)
            least = least if least < -_floor(problem.dtype, d, top) else 0.0
        return cls(problem, weight_decay, modes, top, False, dense, least, seed)

    @classmethod
    def _from_blocks(
        cls, problem: Problem, blocks: Tensor, weight_decay: float, seed: int
    ) -> HessianCurvature:
        dense = _AllDirections.of(blocks.mean(0), (blocks @ blocks).mean(0), problem.dtype)
        blocks = dense.vectors.T @ blocks @ dense.vectors
        modes = HessianModes(dense.values, blocks, torch.zeros_like(dense.values))
        top = float(dense.values[-1]) - weight_decay if len(dense.values) else 0.0
        return cls(problem, weight_decay, modes, top, True, dense, dense.least, seed)

    def obstacle(self, noise: float) -> str | None:
        """Return why no learning rate is stable, if that is known."""
        if self.least < 0:
            return leaves(self.least)
        if noise and self.dense is not None and self.dense.flat_noise:
            return (
                f"samples have curvature, {self.dense.flat_noise:.3g}, along a direction in which their"
                " mean has none: its second moment grows at any learning rate"
            )
        return None

    @property
    def empty(self) -> bool:
        """Whether no direction has curvature."""
        return not len(self.modes.eigenvalues)

    def in_modes(self, step: LinearStep) -> LinearStep:
        """Return the step on the modes, which contain the weight decay."""
        return replace(step, weight_decay=0.0)

    def families(
        self, weights: Weights, noise: Callable[[float], float], most: float, step: LinearStep
    ) -> list[BlockFamily]:
        """Return gains whose crossings bound the threshold from above."""
        found = []
        for kept, extra in spills(self.modes.eigenvalues, self.modes.spill, step):
            part = HessianModes(
                self.modes.eigenvalues[kept],
                self.modes.blocks[:, kept][:, :, kept],
                self.modes.spill[kept],
            )
            found.append(BlockFamily(part, weights, noise, most, extra))
        return found

    def theorem1_lr(self, noise: float, step: LinearStep) -> float | None:
        """Return the largest learning rate that condition (8) allows; ``None`` if it is not known."""
        if self.obstacle(noise) is not None:
            return 0.0
        return None if self.dense is None else self.dense.theorem1_lr(noise)

    def certain_lr(self, noise: float, step: LinearStep, found: Crossing) -> float:
        """Return a learning rate up to which no second moment grows; 0 if none is known.

        Beyond :data:`MAX_DENSE` parameters it relies on upper bounds that fail with a probability of
        at most 0.2 % each.
        """
        if self.obstacle(noise) is not None:
            return 0.0
        if self.dense is not None:
            known = self.dense.stable_lr(noise, self.in_modes(step))
            return max(known, found.lower) if self.exact else known
        hessian = Hessian(self.problem)
        negated = top_eigenpair(Negated(hessian), tol=_TOL, seed=self.seed)
        if negated.upper_bound is None or negated.upper_bound >= self.weight_decay:
            return 0.0
        if noise == 0:
            top = top_eigenpair(hessian, tol=_TOL, seed=self.seed).upper_bound
            return 0.0 if top is None else step.max_lr(top)
        if step.momentum:
            return 0.0
        square = _MeanSquare(hessian, NonUniformity(self.problem), noise, self.weight_decay)
        most = top_eigenpair(square, tol=_TOL, seed=self.seed).upper_bound
        # Of condition (8), 2 H >= eta (H^2 + p Sigma), the left is at least twice the least curvature.
        least = self.weight_decay - negated.upper_bound
        return 0.0 if most is None else 2 * least / most


@dataclass(frozen=True)
class _AllDirections:
    """The mean Hessian and the mean of its samples' squares, on all directions with curvature.

    Attributes:
        values: the positive eigenvalues of the mean, ascending, ``(r,)``.
        vectors: their eigenvectors ``(d, r)``.
        squares: the mean of the squared Hessians between these, ``(r, r)``.
        least: the least eigenvalue of the mean if it is negative; else 0.
        flat_noise: the largest root mean square curvature of samples along a direction in which their
            mean has none; 0 if that is rounding.
    """

    values: Tensor
    vectors: Tensor
    squares: Tensor
    least: float
    flat_noise: float

    @classmethod
    def of(cls, mean: Tensor, second: Tensor, dtype: torch.dtype) -> _AllDirections:
        """Return it for the mean and the mean square, ``(d, d)``, computed in ``dtype``."""
        values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
        second = (second + second.T) / 2
        floor = _floor(dtype, len(values), float(values.abs().max()))
        kept = values > floor
        least = float(values[0])
        flat = vectors[:, ~kept]
        own = (flat * (second @ flat)).sum(0).clamp(min=0).sqrt()
        noise = float(own.max()) if len(own) else 0.0
        # Rounding of the squares; ``own`` is their root.
        rounding = _floor(dtype, len(values), float(torch.linalg.eigvalsh(second)[-1])) ** 0.5
        turned = vectors[:, kept]
        return cls(
            values[kept],
            turned,
            turned.T @ second @ turned,
            least if least < -floor else 0.0,
            noise if noise > rounding else 0.0,
        )

    def theorem1_lr(self, noise: float) -> float:
        r""":math:`2/\lambda_{\max}(H^{\dagger/2}[H^2 + p\Sigma]H^{\dagger/2})`."""
        h = self.values
        if not len(h):
            return math.inf
        square = noise * self.squares + (1 - noise) * torch.diag(h**2)
        scaled = square / (h.unsqueeze(1) * h).sqrt()
        return 2 / float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[-1])

    def stable_lr(self, noise: float, step: LinearStep) -> float:
        """Return a stable rate from the mean square alone: by X = I, and by condition (8)."""
        h = self.values
        if not len(h):
            return math.inf
        edge = step.max_lr(float(h[-1]))
        if noise == 0:
            return edge
        others = h.unsqueeze(1)

        def bound(lr: float) -> float:
            at = mode_weights(others, h, replace(step, lr=lr)) + noise * others * h
            return noise * float(torch.linalg.eigvalsh(self.squares / at)[-1])

        found = root(bound, edge)
        return found if step.momentum else max(found, self.theorem1_lr(noise))


def few_entries(problem: Problem) -> bool:
    """Return whether all entries of the samples' Hessians are used."""
    d = problem.num_params
    return d <= MAX_PARAMETERS and problem.num_samples * d**2 <= _ENTRIES


def leaves(least: float) -> str:
    """Return what follows from the negative curvature ``least``."""
    return (
        f"the Hessian has negative curvature here, {least:.3g}: at any learning rate training leaves"
        " along that direction"
    )


def _floor(dtype: torch.dtype, d: int, scale: float) -> float:
    return _ROUNDING * d * torch.finfo(dtype).eps * abs(scale)


def _restricted(
    hessian: Hessian, basis: Tensor, weight_decay: float
) -> tuple[HessianModes, float, float]:
    """Return the positive modes of the Hessians in the span of ``basis``, and extremes of the mean.

    These are its least curvature there, with the weight decay, and its largest, without.
    """
    blocks = hessian_blocks(hessian.problem, basis)
    k = blocks.shape[1]
    values, vectors = torch.linalg.eigh(blocks.mean(0))
    kept = values + weight_decay > _floor(hessian.dtype, k, float(values.abs().max()))
    turned = vectors[:, kept]
    blocks = turned.T @ blocks @ turned + weight_decay * torch.eye(turned.shape[1]).to(blocks)
    ritz = (basis.double() @ turned).to(basis)
    residuals = (hessian @ ritz).double() - ritz.double() * values[kept]
    # A Gram matrix of k vectors is at most k times its diagonal.
    spill = turned.shape[1] * residuals.square().sum(0)
    modes = HessianModes(values[kept] + weight_decay, blocks, spill)
    return modes, float(values[0]) + weight_decay, float(values[-1])
