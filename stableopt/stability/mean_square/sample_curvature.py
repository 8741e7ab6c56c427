"""`SampleCurvature`: the samples' curvature in all directions, or in the leading ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from stableopt.curvature import GaussNewton, NonUniformity, Problem
from stableopt.curvature.eigen.leading import leading_eigenpairs
from stableopt.curvature.gram.gram import (
    DualCurvature,
    Modes,
    count_outputs,
    largest_block,
    project,
)
from stableopt.curvature.gram.jacobian import check_outputs
from stableopt.stability.mean_square.crossing import root
from stableopt.stability.mean_square.second_moments import gather, mode_weights
from stableopt.stability.rules.limits import LinearStep

__all__ = ["SampleCurvature"]

_GRID = 256
"""Number of grid points for the maximum of a smooth function of the curvature."""


@dataclass(frozen=True)
class SampleCurvature:
    """Modes of the mean curvature, and bounds if they are not all modes.

    Attributes:
        modes: modes of the mean, with every sample's factors.
        sharpness: the largest eigenvalue of the mean; for leading modes, an upper bound within their
            residual.
        exact: whether these are all modes.
        largest_sample: if not, the largest eigenvalue of any single sample's matrix.
    """

    modes: Modes
    sharpness: float
    exact: bool
    largest_sample: float

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
        return cls(problem.modes, problem.sharpness, True, float("nan"))

    @classmethod
    def _leading(
        cls, problem: Problem, directions: int, differences: bool, seed: int
    ) -> SampleCurvature:
        mean = leading_eigenpairs(GaussNewton(problem), directions, seed=seed)
        basis = mean.vectors
        if differences:
            more = leading_eigenpairs(NonUniformity(problem), directions, seed=seed + 1)
            basis = torch.cat([basis, more.vectors], dim=1)
        # Twice, since the remainders of nearly dependent columns are orthogonal only then.
        basis = torch.linalg.qr(torch.linalg.qr(basis).Q).Q
        top = float(mean.values[0] + mean.absolute_residuals[0])
        return cls(project(problem, basis), top, False, largest_block(problem))

    def theorem1_lr(self, noise: float, step: LinearStep) -> float:
        r"""Return the largest learning rate that condition (8) allows.

        It is :math:`2/\lambda_{\max}(H^{\dagger/2}[H^2 + p\Sigma]H^{\dagger/2})`, with
        :math:`H+\lambda I` for H under weight decay.
        """
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

    def stable_lr(self, noise: float, step: LinearStep) -> float:
        r"""Return a learning rate that is certainly stable, from the largest curvatures only.

        The noise gain of S = I is at most :math:`p\,\max_i\lambda_{\max}(H_i)\,\max_h h/V(h,h)` over h
        from 0 to the sharpness.
        """
        if self.sharpness <= 0:
            return step.max_lr(0.0)
        edge = step.max_lr(self.sharpness)
        if noise == 0:
            return edge
        h = torch.linspace(0, self.sharpness, _GRID + 1, dtype=torch.float64)[1:]

        def bound(lr: float) -> float:
            gains = h / (mode_weights(h, h, replace(step, lr=lr)) + noise * h**2)
            return noise * self.largest_sample * float(gains.max())

        return root(bound, edge)
