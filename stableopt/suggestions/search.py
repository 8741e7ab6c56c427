"""`Search`: the threshold of one update rule for each batch size, or a bound where it is not known."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from stableopt.curvature import Hessian, Problem, SecondDerivativeError, top_eigenpair
from stableopt.stability.mean_square.choice import curvature_of
from stableopt.stability.mean_square.critical_lr import threshold
from stableopt.stability.mean_square.hessian_curvature import HessianCurvature, Negated, at_saddle
from stableopt.stability.mean_square.sample_curvature import SampleCurvature
from stableopt.stability.rules.limits import LinearStep, noise_factor
from stableopt.suggestions.result import Suggestion

__all__ = ["PointCurvature", "Search"]

_DIRECTIONS = 8
"""Leading directions used if there are too many directions for all."""

_NEGATIVE = 4e-3
"""Negative curvature, relative to the sharpness, up to which a point counts as a minimum."""

_UNSTABLE = "no rate is stable"


@dataclass(frozen=True)
class PointCurvature:
    """The curvature at a point, in an optimizer's coordinates.

    Attributes:
        sharpness: the largest eigenvalue of the Hessian.
        smallest: its smallest eigenvalue; 0 if ``samples`` is known.
        samples: the curvature of the samples; ``None`` if only the sharpness is known.
        share: the residual share, if measured.
    """

    sharpness: float
    smallest: float
    samples: SampleCurvature | HessianCurvature | None
    share: float | None


@dataclass
class Search:
    """Thresholds at one point, with notes on how far they hold.

    Attributes:
        problem: the problem at the point.
        dataset_size: samples in the training set; ``None`` for infinitely many.
        max_rows: rows nC up to which all directions are used.
        seed: seed of the eigen-solvers.
        notes: what a user should know of the answers, each sentence once.
    """

    problem: Problem
    dataset_size: int | None
    max_rows: int
    seed: int
    notes: list[str] = field(default_factory=list, init=False)

    def note(self, text: str) -> None:
        """Add ``text`` to the notes, once."""
        if text not in self.notes:
            self.notes.append(text)

    def curvature_at(self, problem: Problem) -> PointCurvature:
        """Measure the curvature of a problem in its coordinates."""
        hessian = Hessian(problem)
        sharpness = top_eigenpair(hessian, tol=1e-2, seed=self.seed).value
        try:
            samples, share = curvature_of(
                problem,
                "auto",
                LinearStep(1.0),
                max_rows=self.max_rows,
                directions=min(_DIRECTIONS, problem.num_params),
                differences=True,
                seed=self.seed,
            )
        except (ValueError, TypeError, SecondDerivativeError) as error:
            self.note(f"bounds by the sharpness alone: {error}")
            smallest = -top_eigenpair(Negated(hessian), tol=1e-2, seed=self.seed).value
            if smallest < -_NEGATIVE * abs(sharpness):
                self._note_unstable(at_saddle(smallest))
            return PointCurvature(sharpness, smallest, None, None)
        return PointCurvature(sharpness, 0.0, samples, share)

    def _note_unstable(self, reason: str) -> None:
        """Note why no rate is stable, once: AdamW would give a reason for each batch size."""
        if not any(note.startswith(_UNSTABLE) for note in self.notes):
            self.note(f"{_UNSTABLE}: {reason}")

    def answer(
        self, name: str, point: PointCurvature, step: LinearStep, batch_size: int
    ) -> Suggestion:
        """Return the threshold for one batch size."""
        began = time.perf_counter()
        edge = step.max_lr(point.sharpness)
        noise = noise_factor(batch_size, self.dataset_size)
        noise_known = not noise or (step.momentum_share == 1 and step.filter is None)
        if point.samples is None or not noise_known:
            if point.samples is not None:
                self.note(
                    f"{name}: bounds of the full batch, since its second moments are not known"
                )
            # Without noise, and at a minimum, the edge of the Hessian is the threshold.
            exact = noise == 0 and point.smallest >= -_NEGATIVE * abs(point.sharpness)
            seconds = time.perf_counter() - began
            return Suggestion(name, batch_size, edge, edge if exact else None, exact, seconds)
        result = threshold(point.samples, step, noise, share=point.share, seed=self.seed)
        if result.obstacle is not None:
            self._note_unstable(result.obstacle)
        return Suggestion(
            name,
            batch_size,
            # Leading directions may miss part of the sharpness: the edge caps an inexact value.
            result.value if result.exact else min(result.value, edge),
            result.lower or None,
            result.exact and result.converged,
            time.perf_counter() - began,
        )
