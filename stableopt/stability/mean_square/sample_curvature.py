"""`SampleCurvature`: curvature from the samples' Gauss–Newton matrices, in all or leading directions."""

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
from stableopt.stability.mean_square.second_moments import gather, mode_weights, weight_corrections
from stableopt.stability.rules.limits import LinearStep

__all__ = ["SampleCurvature"]

_GRID = 256
"""Number of grid points for the maximum of a smooth function of the curvature."""

_TOL = 1e-3
"""Relative residual of the eigen-solve whose upper bound certifies a learning rate."""


@dataclass(frozen=True)
class SampleCurvature:
    """Modes of the mean Gauss–Newton matrix, and bounds on the other directions.

    Attributes:
        modes: modes of the mean, with every sample's factors.
        sharpness: the largest eigenvalue of the mean; a lower bound of it with leading modes only.
        exact: whether these are all modes.
        bounds: bounds on all directions; ``None`` if ``exact``.
    """

    modes: Modes
    sharpness: float
    exact: bool
    bounds: _Bounds | None = None

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

        Leading modes span ``directions`` eigenvectors of the mean, and with ``differences`` as many of
        Sigma.
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
        count = len(modes.eigenvalues)
        # `project` drops the columns without curvature, which come first.
        basis = basis[:, basis.shape[1] - count :]
        residuals = (gauss_newton @ basis).double() - basis.double() * modes.eigenvalues
        top = float(modes.eigenvalues[-1]) if count else 0.0
        samples = sample_sizes(problem)
        solver_bound = top_eigenpair(gauss_newton, tol=_TOL, seed=seed).upper_bound
        # The top eigenvalue of a mean is at most the largest top eigenvalue of its terms.
        sharpness_bound = samples.largest
        if solver_bound is not None:
            sharpness_bound = min(solver_bound, sharpness_bound)
        residual_bounds = count * residuals.square().sum(0)
        return cls(modes, top, False, _Bounds(samples, max(sharpness_bound, top), residual_bounds))

    @property
    def empty(self) -> bool:
        """Whether no direction has curvature."""
        return self.sharpness <= 0

    def obstacle(self, noise: float) -> str | None:
        """Return ``None``: Gauss–Newton matrices are positive semi-definite."""
        return None

    def in_modes(self, step: LinearStep) -> LinearStep:
        """Return the step on the modes, which do not contain the weight decay."""
        return step

    def families(
        self, weights: Weights, noise: Callable[[float], float], t_max: float, step: LinearStep
    ) -> list[FactorFamily]:
        """Return gains whose crossings bound the threshold from above."""
        if self.bounds is None:
            return [FactorFamily(self.modes, weights, noise, t_max)]
        h, factors = self.modes.eigenvalues, self.modes.factors
        return [
            FactorFamily(Modes(h[kept], factors[:, :, kept]), weights, noise, t_max, correction)
            for kept, correction in weight_corrections(h, self.bounds.residual_bounds, step)
        ]

    def theorem1_lr(self, noise: float, step: LinearStep) -> float | None:
        r"""Return the largest learning rate that condition (8) allows; ``None`` if it is unknown.

        It is :math:`2/\lambda_{\max}(H^{\dagger/2}[H^2 + p\Sigma]H^{\dagger/2})`, where H includes the
        weight decay.
        """
        if not self.exact:
            return None
        h, factors = self.modes.eigenvalues, self.modes.factors
        if not len(h):
            return step.max_lr(0.0)
        n = factors.shape[0]
        mean_square = gather(factors, (factors @ factors.mT).flatten()) / n
        decayed = h + step.weight_decay
        matrix = torch.diag(decayed**2) + noise * (mean_square - torch.diag(h**2))
        scaled = matrix / (decayed.unsqueeze(1) * decayed).sqrt()
        # Directions without curvature add only the weight decay as an eigenvalue, which is smaller.
        return 2 / float(torch.linalg.eigvalsh((scaled + scaled.T) / 2)[-1])

    def certain_lr(self, noise: float, step: LinearStep, crossing: Crossing) -> float:
        r"""Return a learning rate up to which no second moment grows.

        With leading modes it follows from the largest curvatures: the noise gain of S = I is at most
        :math:`p\,\max_i\lambda_{\max}(H_i)\,\max_h h/V(h,h)` over h from 0 to the sharpness.
        """
        if self.bounds is None:
            return crossing.lower
        sharpness = self.bounds.sharpness_bound
        edge = step.max_lr(sharpness)
        if noise == 0 or sharpness <= 0:
            return edge
        h = torch.linspace(0, sharpness, _GRID + 1, dtype=torch.float64, device="cpu")[1:]
        largest = self.bounds.samples.largest

        def bound(lr: float) -> float:
            gains = h / (mode_weights(h, h, replace(step, lr=lr)) + noise * h**2)
            return noise * largest * float(gains.max())

        return root(bound, edge)

    def bulk_lr(self, noise: float, step: LinearStep) -> float:
        r"""Return an upper bound from the second moment X = I, which has all directions.

        A stable step has :math:`\mathrm{tr}\,w(H) \ge p\,(\frac1n\sum_i\|H_i\|_F^2 - \|H\|_F^2)`. The
        leading modes do not imply this: many directions of little curvature may grow first.
        """
        if self.bounds is None or noise == 0 or step.nesterov or step.weight_decay:
            return math.inf
        samples, beta = self.bounds.samples, step.momentum
        # ||H||_F^2 is the mean of <H_i, H_j> over pairs of samples, so it is at least the terms i = j.
        # It is at most the largest eigenvalue times the trace.
        smallest = samples.mean_square / samples.count
        largest = min(samples.mean_square, self.bounds.sharpness_bound * samples.mean_trace)
        factor = noise - (1 - beta) / (1 + beta)
        excess = noise * samples.mean_square - factor * (largest if factor > 0 else smallest)
        if excess <= 0:
            return math.inf
        return 2 * (1 - beta) * samples.mean_trace / excess / step.gain


@dataclass(frozen=True)
class _Bounds:
    """Bounds on all directions, for a curvature with leading modes only.

    Attributes:
        samples: sizes of the single samples' matrices.
        sharpness_bound: an upper bound of the mean's largest eigenvalue. If it comes from the
            eigen-solver, it fails with a probability of at most 0.2 %.
        residual_bounds: as for
            :func:`~stableopt.stability.mean_square.second_moments.weight_corrections`.
    """

    samples: SampleSizes
    sharpness_bound: float
    residual_bounds: Tensor
