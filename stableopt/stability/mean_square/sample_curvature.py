"""`SampleCurvature`: the samples' curvature in all directions, or in the leading ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stableopt.curvature import GaussNewton, NonUniformity, Problem, top_eigenpair
from stableopt.curvature.gram.gram import (
    DualCurvature,
    Modes,
    SampleSizes,
    count_outputs,
    project,
    sample_sizes,
)
from stableopt.curvature.gram.jacobian import check_outputs
from stableopt.stability.mean_square.crossing import Crossing, FactorFamily, Weights, root
from stableopt.stability.mean_square.leading import leading_directions
from stableopt.stability.mean_square.second_moments import gather, mode_weights, spills
from stableopt.stability.rules.limits import LinearStep

__all__ = ["SampleCurvature"]

_GRID = 256
"""Number of grid points for the maximum of a smooth function of the curvature."""

_TOL = 1e-3
"""Relative residual of the eigen-solve whose upper bound certifies a learning rate."""


@dataclass(frozen=True)
class SampleCurvature:
    """Modes of the mean curvature, and bounds if they are not all modes.

    Attributes:
        modes: modes of the mean, with every sample's factors.
        sharpness: the largest eigenvalue of the mean; for leading modes, never above it.
        exact: whether these are all modes.
        rest: if not, what is known of all directions.
    """

    modes: Modes
    sharpness: float
    exact: bool
    rest: _Rest | None = None

    hessians = "gauss-newton"

    @classmethod
    def from_problem(
        cls,
        problem: Problem | DualCurvature,
        *,
        max_rows: int,
        directions: int,
        differences: bool,
        seed: int,
    ) -> SampleCurvature:
        """Return all modes of a problem with at most ``max_rows`` rows nC, else its leading ones.

        Leading modes are ``directions`` eigenvectors of the mean, and with ``differences`` as many of
        the differences between samples.
        """
        if not isinstance(problem, DualCurvature):
            check_outputs(problem)
            problem = problem.without_weight_decay()
            if problem.num_samples * count_outputs(problem) > max_rows:
                return cls._leading(problem, directions, differences, seed)
            problem = DualCurvature.from_problem(problem)
        return cls(problem.modes, problem.sharpness, True)

    @classmethod
    def _leading(
        cls, problem: Problem, directions: int, differences: bool, seed: int
    ) -> SampleCurvature:
        gauss_newton = GaussNewton(problem)
        operators = [gauss_newton, NonUniformity(problem)] if differences else [gauss_newton]
        basis = leading_directions(operators, directions, seed=seed)
        values, vectors = torch.linalg.eigh((basis.T @ (gauss_newton @ basis)).double())
        basis = basis @ vectors[:, values > 0].to(basis)
        modes = project(problem, basis)
        kept = len(modes.eigenvalues)
        # The last columns, since those of no curvature come first.
        basis = basis[:, basis.shape[1] - kept :]
        residuals = (gauss_newton @ basis).double() - basis.double() * modes.eigenvalues
        top = float(modes.eigenvalues[-1]) if kept else 0.0
        samples = sample_sizes(problem)
        bound = top_eigenpair(gauss_newton, tol=_TOL, seed=seed).upper_bound
        # No mean of positive semi-definite matrices exceeds the largest of them.
        largest = samples.largest if bound is None else min(bound, samples.largest)
        rest = _Rest(samples, max(largest, top), kept * residuals.square().sum(0))
        return cls(modes, top, False, rest)

    @property
    def empty(self) -> bool:
        """Whether no direction has curvature."""
        return self.sharpness <= 0

    def obstacle(self, noise: float) -> str | None:
        """Return ``None``: Gauss–Newton matrices are positive semi-definite."""
        return None

    def in_modes(self, step: LinearStep) -> LinearStep:
        """Return the step on the modes, which do not contain its weight decay."""
        return step

    def families(
        self, weights: Weights, noise: Callable[[float], float], most: float, step: LinearStep
    ) -> list[FactorFamily]:
        """Return gains whose crossings bound the threshold from above."""
        if self.rest is None:
            return [FactorFamily(self.modes, weights, noise, most)]
        h, factors = self.modes.eigenvalues, self.modes.factors
        return [
            FactorFamily(Modes(h[kept], factors[:, :, kept]), weights, noise, most, extra)
            for kept, extra in spills(h, self.rest.spill, step)
        ]

    def theorem1_lr(self, noise: float, step: LinearStep) -> float | None:
        r"""Return the largest learning rate that condition (8) allows; ``None`` if it is not known.

        It is :math:`2/\lambda_{\max}(H^{\dagger/2}[H^2 + p\Sigma]H^{\dagger/2})`, with
        :math:`H+\lambda I` for H under weight decay.
        """
        if not self.exact:
            return None
        h, factors = self.modes.eigenvalues, self.modes.factors
        if not len(h):
            return step.max_lr(0.0)
        n = factors.shape[0]
        second = gather(factors, (factors @ factors.mT).flatten()) / n
        decayed = h + step.weight_decay
        matrix = torch.diag(decayed**2) + noise * (second - torch.diag(h**2))
        scaled = matrix / (decayed.unsqueeze(1) * decayed).sqrt()
        top = float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[-1])
        # Directions without curvature are bounded by the decay, which is less.
        return 2 / top

    def certain_lr(self, noise: float, step: LinearStep, found: Crossing) -> float:
        r"""Return a learning rate up to which no second moment grows.

        With leading modes it follows from the largest curvatures: the noise gain of S = I is at most
        :math:`p\,\max_i\lambda_{\max}(H_i)\,\max_h h/V(h,h)` over h from 0 to the sharpness.
        """
        if self.rest is None:
            return found.lower
        sharpness = self.rest.sharpness_bound
        edge = step.max_lr(sharpness)
        if noise == 0 or sharpness <= 0:
            return edge
        h = torch.linspace(0, sharpness, _GRID + 1, dtype=torch.float64)[1:]
        largest = self.rest.samples.largest

        def bound(lr: float) -> float:
            gains = h / (mode_weights(h, h, replace(step, lr=lr)) + noise * h**2)
            return noise * largest * float(gains.max())

        return root(bound, edge)

    def bulk_lr(self, noise: float, step: LinearStep) -> float:
        r"""Return an upper bound from the second moment X = I, whose noise comes from all directions.

        It is stable only if :math:`\mathrm{tr}\,w(H) \ge
        p\,(\frac1n\sum_i\|H_i\|_F^2 - \|H\|_F^2)`. Many directions of little curvature, about which
        the leading ones say nothing, may together be the first to grow.
        """
        if self.rest is None or noise == 0 or step.nesterov or step.weight_decay:
            return math.inf
        samples, beta = self.rest.samples, step.momentum
        # ||H||_F^2 lies between a mean over pairs of samples, known for equal ones only, and
        # the largest eigenvalue times the trace.
        least = samples.mean_square / samples.count
        most = min(samples.mean_square, self.rest.sharpness_bound * samples.mean_trace)
        share = noise - (1 - beta) / (1 + beta)
        removed = noise * samples.mean_square - share * (most if share > 0 else least)
        if removed <= 0:
            return math.inf
        return 2 * (1 - beta) * samples.mean_trace / removed / step.gain


@dataclass(frozen=True)
class _Rest:
    """What is known of all directions where only leading modes are used.

    Attributes:
        samples: sizes of the single samples' matrices.
        sharpness_bound: an upper bound of the mean's largest eigenvalue; where it comes from the
            eigen-solver, it fails with a probability of at most 0.2 %.
        spill: of the modes, as for :func:`~stableopt.stability.mean_square.second_moments.spills`.
    """

    samples: SampleSizes
    sharpness_bound: float
    spill: Tensor
