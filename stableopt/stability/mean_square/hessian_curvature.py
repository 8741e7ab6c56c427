r"""`HessianCurvature`: curvature from the samples' own Hessians, for points that do not fit all samples.

Gauss–Newton matrices (:mod:`~stableopt.stability.mean_square.sample_curvature`) differ from the Hessians
there, and Hessians may be indefinite. With few parameters all entries of the Hessians are used, and the
threshold is exact. With more, there is a bracket: second moments restricted to leading eigenvectors of H
and :math:`\Sigma` give an upper bound, and a condition on all directions a lower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature import Hessian, NonUniformity, Operator, Problem, top_eigenpair
from stableopt.curvature.per_sample.blocks import hessian_blocks
from stableopt.stability.mean_square.crossing import BlockFamily, Crossing, Weights, root
from stableopt.stability.mean_square.leading import leading_directions
from stableopt.stability.mean_square.second_moments import (
    HessianModes,
    mode_weights,
    weight_corrections,
)
from stableopt.stability.rules.limits import LinearStep

__all__ = ["MAX_PARAMETERS", "HessianCurvature", "Negated", "at_saddle", "few_entries"]

MAX_PARAMETERS = 64
"""Parameters up to which all entries of the samples' Hessians are used: a product with second moments
takes 4 n d^3 operations."""

MAX_DENSE = 256
"""Parameters up to which the lower bound uses the dense mean of squared Hessians: 2d products."""

_ENTRIES = 2**25
"""Entries of the samples' Hessians up to which all are used: 256 MiB."""

_ROUNDING = 10
"""Rounding error of a Hessian's entry, in units of machine epsilon times the largest eigenvalue."""

_TOL = 1e-3
"""Relative residual of the eigen-solves whose upper bounds certify a learning rate."""


class Negated(Operator):
    """-H, whose largest eigenvalue is minus H's smallest."""

    def __init__(self, hessian: Hessian) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device)
        self.inner_product, self._hessian = hessian.inner_product, hessian

    def product(self, vector: Tensor) -> Tensor:
        """Return -H times ``vector``."""
        return -(self._hessian @ vector)


class _MeanSquare(Operator):
    r""":math:`H^2 + p\Sigma`, for H with weight decay: the mean square of a batch's Hessian."""

    def __init__(self, hessian: Hessian, spread: NonUniformity, noise: float, decay: float) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device)
        self.inner_product = hessian.inner_product
        self._hessian, self._spread, self._noise, self._decay = hessian, spread, noise, decay

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector``."""
        image = self._hessian @ vector + self._decay * vector
        squared = self._hessian @ image + self._decay * image
        if self._noise == 0:
            return squared
        return squared + self._noise * (self._spread @ vector)


@dataclass(frozen=True)
class HessianCurvature:
    """Modes of positive curvature of the mean Hessian, and bounds on all directions.

    Attributes:
        problem: the problem, without weight decay.
        weight_decay: the number that weight decay adds to every sample's curvature.
        modes: the modes, with the weight decay.
        sharpness: the largest eigenvalue of the mean Hessian, without weight decay, or a lower bound.
        exact: whether the modes are all directions of positive curvature.
        dense: dense matrices on all directions; ``None`` with too many parameters.
        least: the smallest known curvature, with the weight decay, if it is negative; else 0.
        seed: seed of the eigen-solvers.
    """

    problem: Problem
    weight_decay: float
    modes: HessianModes
    sharpness: float
    exact: bool
    dense: _DenseBounds | None
    least: float
    seed: int

    hessians = "true"

    @classmethod
    def from_problem(
        cls, problem: Problem, *, weight_decay: float, directions: int, seed: int
    ) -> HessianCurvature:
        """Return all modes of a small problem, else ``directions`` leading ones of H and of Sigma."""
        problem = problem.without_weight_decay()
        d = problem.num_params
        eye = torch.eye(d, dtype=problem.dtype, device=problem.device) if d <= MAX_DENSE else None
        if eye is not None and few_entries(problem):
            blocks = hessian_blocks(problem, eye)
            blocks = blocks + weight_decay * _identity(d, blocks)
            return cls._from_blocks(problem, blocks, weight_decay, seed)
        hessian, spread = Hessian(problem), NonUniformity(problem)
        basis = leading_directions([hessian, spread], min(directions, d), seed=seed)
        modes, least, top = _restrict(hessian, basis, weight_decay)
        dense = None
        if eye is not None:
            mean = (hessian @ eye).double() + weight_decay * eye.double()
            mean_square = mean @ mean + (spread @ eye).double()
            # Blocks of all flat directions at once, unless their entries are too many.
            width = max(1, math.isqrt(_ENTRIES // problem.num_samples))

            def blocks_along(flat: Tensor) -> Iterator[Tensor]:
                for part in torch.split(flat.to(eye), width, dim=1):
                    yield hessian_blocks(problem, part) + weight_decay * _identity(
                        part.shape[1], flat
                    )

            dense = _DenseBounds.from_moments(mean, mean_square, blocks_along, problem.dtype)
            least = dense.least
        else:
            lowest = -top_eigenpair(Negated(hessian), tol=_TOL, seed=seed).value
            # A negative Rayleigh quotient proves negative curvature, converged or not.
            least = min(least, lowest + weight_decay)
            least = least if least < -_rounding(problem.dtype, d, top) else 0.0
        return cls(problem, weight_decay, modes, top, False, dense, least, seed)

    @classmethod
    def _from_blocks(
        cls, problem: Problem, blocks: Tensor, weight_decay: float, seed: int
    ) -> HessianCurvature:
        """Return all modes from the samples' Hessians ``(n, d, d)``."""
        mean, mean_square = blocks.mean(0), (blocks @ blocks).mean(0)
        dense = _DenseBounds.from_moments(
            mean, mean_square, lambda flat: [flat.T @ blocks @ flat], problem.dtype
        )
        blocks = dense.vectors.T @ blocks @ dense.vectors
        modes = HessianModes(dense.values, blocks, torch.zeros_like(dense.values))
        top = float(dense.values[-1]) - weight_decay if len(dense.values) else 0.0
        return cls(problem, weight_decay, modes, top, True, dense, dense.least, seed)

    def obstacle(self, noise: float) -> str | None:
        """Return why no learning rate is stable, or ``None`` if no reason is known."""
        if self.least < 0:
            return at_saddle(self.least)
        if noise and self.dense is not None and self.dense.flat_noise:
            return (
                f"samples have curvature, {self.dense.flat_noise:.3g}, along a direction in which their"
                " mean has none up to rounding: its second moment grows at any learning rate"
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
        self, weights: Weights, noise: Callable[[float], float], t_max: float, step: LinearStep
    ) -> list[BlockFamily]:
        """Return gains whose crossings bound the threshold from above."""
        families = []
        for kept, correction in weight_corrections(
            self.modes.eigenvalues, self.modes.residual_bounds, step
        ):
            modes = HessianModes(
                self.modes.eigenvalues[kept],
                self.modes.blocks[:, kept][:, :, kept],
                self.modes.residual_bounds[kept],
            )
            families.append(BlockFamily(modes, weights, noise, t_max, correction))
        return families

    def theorem1_lr(self, noise: float, step: LinearStep) -> float | None:
        """Return the largest learning rate that condition (8) allows; ``None`` if it is unknown."""
        if self.obstacle(noise) is not None:
            return 0.0
        return None if self.dense is None else self.dense.theorem1_lr(noise)

    def certain_lr(self, noise: float, step: LinearStep, crossing: Crossing) -> float:
        """Return a learning rate up to which no second moment grows; 0 if none is known.

        Beyond :data:`MAX_DENSE` parameters it relies on upper bounds that fail with a probability of
        at most 0.2 % each.
        """
        if self.obstacle(noise) is not None:
            return 0.0
        if self.dense is not None:
            lr = self.dense.stable_lr(noise, self.in_modes(step))
            return max(lr, crossing.lower) if self.exact else lr
        hessian = Hessian(self.problem)
        negated_bound = top_eigenpair(Negated(hessian), tol=_TOL, seed=self.seed).upper_bound
        if negated_bound is None or negated_bound >= self.weight_decay:
            return 0.0
        if noise == 0:
            sharpness_bound = top_eigenpair(hessian, tol=_TOL, seed=self.seed).upper_bound
            return 0.0 if sharpness_bound is None else step.max_lr(sharpness_bound)
        if step.momentum:
            return 0.0
        mean_square = _MeanSquare(hessian, NonUniformity(self.problem), noise, self.weight_decay)
        square_bound = top_eigenpair(mean_square, tol=_TOL, seed=self.seed).upper_bound
        # Condition (8) is 2 H >= eta (H^2 + p Sigma), and H >= least I.
        least = self.weight_decay - negated_bound
        return 0.0 if square_bound is None else 2 * least / square_bound


@dataclass(frozen=True)
class _DenseBounds:
    """Lower bounds from the dense mean Hessian and the dense mean of squared Hessians.

    Attributes:
        values: the positive eigenvalues of the mean, ascending, ``(r,)``.
        vectors: their eigenvectors ``(d, r)``.
        squares: the mean of the squared Hessians in the basis of these, ``(r, r)``.
        least: the smallest eigenvalue of the mean if it is negative; else 0.
        flat_noise: the root mean square curvature of samples along directions in which the mean has no
            curvature; 0 if it is rounding.
    """

    values: Tensor
    vectors: Tensor
    squares: Tensor
    least: float
    flat_noise: float

    @classmethod
    def from_moments(
        cls,
        mean: Tensor,
        mean_square: Tensor,
        blocks_along: Callable[[Tensor], Iterable[Tensor]],
        dtype: torch.dtype,
    ) -> _DenseBounds:
        """Return the bounds for the mean and the mean square, ``(d, d)``, computed in ``dtype``.

        ``blocks_along`` returns the samples' Hessians along directions ``(d, k)``, ``(n, k, k)``, or
        several such blocks along parts of the directions.
        """
        values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
        mean_square = (mean_square + mean_square.T) / 2
        rounding = _rounding(dtype, len(values), float(values.abs().max()))
        positive = values > rounding
        least = float(values[0])
        flat = vectors[:, ~positive]
        top_square = float(torch.linalg.eigvalsh(mean_square)[-1])
        noise_rounding = _rounding(dtype, len(values), max(top_square, 0.0) ** 0.5)
        # The mean square has the rounding of top^2, so its root resolves no curvature below the root of
        # the rounding. The samples' own curvatures have the rounding of the top curvature.
        flat_noise = _coupling(mean_square, flat, _rounding(dtype, len(values), top_square))
        if flat.shape[1]:
            noises = (_cancelling(blocks, noise_rounding) for blocks in blocks_along(flat))
            flat_noise = max(flat_noise, *noises)
        basis = vectors[:, positive]
        return cls(
            values[positive],
            basis,
            basis.T @ mean_square @ basis,
            least if least < -rounding else 0.0,
            flat_noise,
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
        """Return a stable learning rate: the larger of the bounds from X = I and condition (8)."""
        h = self.values
        if not len(h):
            return math.inf
        edge = step.max_lr(float(h[-1]))
        if noise == 0:
            return edge
        others = h.unsqueeze(1)

        def bound(lr: float) -> float:
            weights = mode_weights(others, h, replace(step, lr=lr)) + noise * others * h
            return noise * float(torch.linalg.eigvalsh(self.squares / weights)[-1])

        identity_lr = root(bound, edge)
        return identity_lr if step.momentum else max(identity_lr, self.theorem1_lr(noise))


def few_entries(problem: Problem) -> bool:
    """Return whether the problem is small enough to use all entries of the samples' Hessians."""
    d = problem.num_params
    return d <= MAX_PARAMETERS and problem.num_samples * d**2 <= _ENTRIES


def at_saddle(least: float) -> str:
    """Return the message about the negative curvature ``least``."""
    return (
        f"the Hessian has negative curvature here, {least:.3g}: at any learning rate training leaves"
        " along that direction"
    )


def _rounding(dtype: torch.dtype, d: int, scale: float) -> float:
    """Return the rounding error of eigenvalues of a ``(d, d)`` matrix with the norm ``scale``."""
    return _ROUNDING * d * torch.finfo(dtype).eps * abs(scale)


def _identity(size: int, like: Tensor) -> Tensor:
    """Return the identity with the type and device of ``like``."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _cancelling(blocks: Tensor, rounding: float) -> float:
    r"""Return the root mean square of samples' curvatures that cancel in the mean; 0 up to ``rounding``.

    ``blocks`` ``(n, k, k)`` are along directions in which the mean has no curvature up to rounding. The
    mean of their absolute values :math:`(B_i^2)^{1/2}` is then above ``rounding`` only if curvatures of
    either sign cancel. Samples that are positive semi-definite have the mean itself, even if one sample
    has all of the curvature and the root mean square is larger.
    """
    values, vectors = torch.linalg.eigh(blocks)
    absolute = ((vectors * values.abs().unsqueeze(1)) @ vectors.mT).mean(0)
    if float(torch.linalg.eigvalsh(absolute)[-1]) <= rounding:
        return 0.0
    return math.sqrt(float(torch.linalg.eigvalsh((blocks @ blocks).mean(0))[-1]))


def _coupling(mean_square: Tensor, flat: Tensor, rounding: float) -> float:
    r"""Return the largest root mean square of :math:`H_iv`, for v in ``flat``; 0 up to ``rounding``.

    Besides curvature along v it contains the coupling of v to other directions. ``rounding`` is that of
    the square. Positive semi-definite samples have couplings up to the root of the curvature along v,
    and of rounding in it, so smaller couplings mean nothing.
    """
    if not flat.shape[1]:
        return 0.0
    squares = (flat * (mean_square @ flat)).sum(0)
    largest = float(squares.max())
    return math.sqrt(largest) if largest > rounding else 0.0


def _restrict(
    hessian: Hessian, basis: Tensor, weight_decay: float
) -> tuple[HessianModes, float, float]:
    """Return the positive Ritz modes of the Hessians in the span of ``basis``, and extreme Ritz values.

    These are the smallest Ritz value with the weight decay, and the largest without it.
    """
    blocks = hessian_blocks(hessian.problem, basis)
    values, vectors = torch.linalg.eigh(blocks.mean(0))
    rounding = _rounding(hessian.dtype, blocks.shape[1], float(values.abs().max()))
    positive = values + weight_decay > rounding
    vectors = vectors[:, positive]
    count = vectors.shape[1]
    blocks = vectors.T @ blocks @ vectors + weight_decay * _identity(count, blocks)
    ritz_vectors = (basis.double() @ vectors).to(basis)
    residuals = (hessian @ ritz_vectors).double() - ritz_vectors.double() * values[positive]
    # A Gram matrix of k vectors is at most k times its diagonal.
    residual_bounds = count * residuals.square().sum(0)
    modes = HessianModes(values[positive] + weight_decay, blocks, residual_bounds)
    return modes, float(values[0]) + weight_decay, float(values[-1])
