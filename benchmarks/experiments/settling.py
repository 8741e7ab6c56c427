"""Does the mean-square threshold limit where SGD settles, or the almost sure one? Beyond the paper.

From each of several minima SGD continues, with and without momentum, at learning rates around the
minimum's exact mean-square threshold, until the loss is a thousandth of the first. Where it ends the
threshold is computed again, and so is the Lyapunov exponent. Above the mean-square threshold the second
moment grows, but it is carried by rare runs; SGD can converge as long as the exponent, the growth of a
typical run, is negative. So the exponent, not the second moment, is what should limit where SGD settles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import stableopt
from benchmarks.framework.claims import Claim, all_of, at_most
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import coloured, finish, limit, panels, points
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset
from benchmarks.training.escape import RETURNED
from benchmarks.training.loops import evaluate, independent_batches, train
from benchmarks.training.minimum import Solution, from_minimum
from benchmarks.training.networks import flops_per_sample
from benchmarks.training.threshold import Thresholds, curvature_of
from benchmarks.training.update import SGD, Update
from stableopt.stability.simulated.almost_sure import Exponent, lyapunov_exponent

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Settled", "Settling", "SettlingRun"]

UPDATES = {"SGD": SGD, "heavy ball": Update(momentum=0.9)}

LOOK_EVERY = 10
"""Steps between two evaluations of the training loss."""

SURE = 3.0
"""Standard errors of an exponent from zero at which its sign counts as known, one of a hundred."""


@dataclass(frozen=True)
class Settled:
    """Where SGD began and where it ended.

    Attributes:
        lr: learning rate.
        outcome: ``"reached"``, ``"diverged"`` or ``"out of steps"``. Numbers of the end are ``None`` for
            all but the first.
        steps: that were taken.
        largest_loss_ratio: the largest training loss over the first; ``None`` if not finite.
        start_sharpness: of the Gauss–Newton matrix at the start.
        start_exponent: the Lyapunov exponent of this step there, per step.
        start_error: its standard error.
        end_sharpness: where training ended.
        end_non_uniformity: likewise.
        end_box: the larger one of their shares of the box's sides at this learning rate.
        end_ratio: the learning rate over the exact mean-square threshold there.
        end_exponent: the Lyapunov exponent there.
        end_error: its standard error.
    """

    lr: float
    outcome: str
    steps: int
    largest_loss_ratio: float | None
    start_sharpness: float
    start_exponent: float
    start_error: float
    end_sharpness: float | None = None
    end_non_uniformity: float | None = None
    end_box: float | None = None
    end_ratio: float | None = None
    end_exponent: float | None = None
    end_error: float | None = None


@dataclass(frozen=True)
class SettlingRun(Job):
    """SGD from a minimum, with batches drawn independently, until the loss is small again.

    Attributes:
        thresholds: of the minimum, with the update.
        ratio: the learning rate, over the exact threshold of the minimum.
        batch_size: of SGD.
        target_loss: training loss at which the run has settled.
        max_steps: at which it ends in any case.

    The result is a :class:`Settled`; the weights are kept.
    """

    kind = "settling"
    Result: ClassVar = Settled

    thresholds: Thresholds
    ratio: float
    batch_size: int
    target_loss: float
    max_steps: int

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum and its thresholds."""
        return (self.thresholds.start, self.thresholds)

    @property
    def flops(self) -> float:
        """Of some 20,000 steps, and of the evaluations of the loss, which cost a third of a gradient."""
        data = self.thresholds.start.data
        samples = 20_000 * (self.batch_size + data.n / LOOK_EVERY / 3)
        return samples * flops_per_sample(data.name, self.thresholds.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Measure, train, measure again."""
        update = self.thresholds.update
        lr = self.ratio * work.result(self.thresholds).at(self.batch_size).critical_lr
        start = from_minimum(self.thresholds.start, work)
        dual = curvature_of(start, update)
        first = self._exponent(dual, lr)
        found = {"lr": lr, "start_sharpness": dual.sharpness}
        found |= {"start_exponent": first.per_step, "start_error": first.standard_error}

        _, model, images = start
        before = loss = largest = evaluate(model, images)

        def look(step: int, batch_loss: float) -> bool:
            nonlocal loss, largest
            if step % LOOK_EVERY:
                return False
            loss = evaluate(model, images)
            largest = max(largest, loss) if loss < math.inf else math.inf
            work.progress(step / self.max_steps, f"step {step:,}, loss {loss:.1e}")
            return loss <= self.target_loss or not loss < math.inf

        generator = torch.Generator().manual_seed(0)
        batches = independent_batches(images, self.batch_size, generator)
        optimizer = update.optimizer(model, images, lr)
        steps = train(model, optimizer, batches, steps=self.max_steps, after_step=look)
        work.save(model.state_dict())
        found |= {"steps": steps, "largest_loss_ratio": largest / before}
        if not loss < math.inf:
            return {**found, "outcome": "diverged", "largest_loss_ratio": None}
        if loss > self.target_loss:
            return {**found, "outcome": "out of steps"}

        dual = curvature_of(start, update)
        allowed = stableopt.critical_lr(
            dual, batch_size=self.batch_size, update_rule=update.rule(1.0)
        )
        last = self._exponent(dual, lr)
        found |= {**self.of_end(dual, lr), "end_ratio": lr / allowed.value}
        found |= {"end_exponent": last.per_step, "end_error": last.standard_error}
        return {**found, "outcome": "reached"}

    def of_end(self, dual: stableopt.curvature.DualCurvature, lr: float) -> dict[str, float]:
        """Return what the box (9) is about, where training ended."""
        rule, n = self.thresholds.update.rule(lr), self.thresholds.start.data.n
        a, s = dual.sharpness, dual.non_uniformity
        share = max(a / rule.max_sharpness, s / rule.max_non_uniformity(self.batch_size, n))
        return {"end_sharpness": a, "end_non_uniformity": s, "end_box": share}

    def _exponent(self, dual: stableopt.curvature.DualCurvature, lr: float) -> Exponent:
        step = self.thresholds.update.rule(lr).linear_step
        return lyapunov_exponent(dual.modes, step, self.batch_size, until_sure=True)


@dataclass(frozen=True)
class Settling(Experiment):
    """Thresholds where SGD begins, and where it settles.

    Attributes:
        lrs: of the gradient descents that find the minima.
        n: training images: few, since the thresholds take time as (nC)^3.
        start_loss: at which gradient descent stops.
        target_loss: at which SGD does.
        max_steps: at which SGD stops in any case.
        batch_sizes: of SGD.
        ratios: its learning rates, over the exact threshold of the minimum.
    """

    name = "settling"
    shows = "Beyond the paper"
    datasets = ("digits",)
    columns: ClassVar = {"settled": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 16,
            "lrs": (1.0,),
            "start_loss": 3e-3,
            "target_loss": 1e-3,
            "max_steps": 2000,
            "batch_sizes": (1, 4),
            "ratios": (0.5, 1.5),
        },
        ("small", ""): {"seeds": (0, 1)},
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4)},
    }

    lrs: tuple[float, ...] = (0.5, 1.0)
    n: int = 64
    start_loss: float = 3e-5
    target_loss: float = 3e-8
    max_steps: int = 100_000
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    ratios: tuple[float, ...] = (0.8, 1.05, 1.2, 1.6, 2.5)

    def cases(self) -> dict[str, list[Case]]:
        """Return a run for each update, minimum, batch size and ratio."""
        data = Dataset(self.data, self.n)
        starts = [
            Solution(data, lr=lr, seed=seed, target_loss=self.start_loss, max_steps=60_000)
            for lr in self.lrs
            for seed in self.seeds
        ]
        return {
            "settled": [
                case(
                    SettlingRun(
                        Thresholds(start, self.batch_sizes, update),
                        ratio=ratio,
                        batch_size=size,
                        target_loss=self.target_loss,
                        max_steps=self.max_steps,
                    ),
                    *("batch_size", "ratio"),
                    update=name,
                    minimum_lr=start.lr,
                    seed=start.seed,
                )
                for name, update in UPDATES.items()
                for start in starts
                for size in self.batch_sizes
                for ratio in self.ratios
            ]
        }

    def draw(self, name: str, its: pd.DataFrame) -> Figure:
        """Return the learning rate over the threshold where a run settled, against where it began."""
        figure, axes = panels(len(UPDATES), height=3.8, sharey=True)
        for number, (panel, update) in enumerate(zip(axes, UPDATES, strict=True)):
            known: Any = its[its["update"] == update].dropna(subset="end_ratio")
            for size, colour in coloured(sorted(known.batch_size.unique())):
                own = known[known.batch_size == size]
                # A little sideways, so that marks do not hide each other.
                x = own.ratio * (1 + 0.02 * (list(self.batch_sizes).index(size) - 1))
                style = {"markersize": 5, "fillstyle": "none"}
                points(panel, x, own.end_ratio, f"B = {size}", colour, **style)
            limit(panel, y=1, label="mean-square threshold")
            y = "" if number else "η/η* where it settled"
            finish(panel, "η/η* at the start", y, log="x", title=update, ticks=self.ratios)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return which threshold holds where SGD settles, and which says that it leaves."""
        if "settled" not in tables:
            return
        its = tables["settled"]
        ends: Any = its.dropna(subset="end_ratio")
        if not len(ends):
            return
        others = its.outcome[its.outcome != "reached"].value_counts().to_dict()
        lost = "; ".join(f"{outcome}: {count}" for outcome, count in others.items())
        beyond = ends[ends.end_exponent > SURE * ends.end_error]
        above = ends[ends.end_ratio > 1]
        yield all_of(
            "SGD settles only where the Lyapunov exponent is not positive",
            ends.end_exponent <= SURE * ends.end_error,
            theory="it cannot converge elsewhere",
            ours=f"{len(ends) - len(beyond)} of {len(ends)} ends",
            tolerance=f"{SURE:g} standard errors",
            why=lost,
        )
        yield at_most(
            "SGD settles within the mean-square threshold",
            ends.end_ratio,
            1.0,
            "η/η*",
            ours=f"{len(ends) - len(above)} of {len(ends)} ends; largest η/η*"
            f" {ends.end_ratio.max():.3f}",
            why="" if above.empty else "above it the mean grows, but a typical run need not",
        )
        boxed = ends.end_box
        yield at_most(
            "SGD settles within the box (9)",
            boxed,
            1.0,
            "share of its nearest side",
            ours=f"{(boxed <= 1).sum()} of {len(ends)} ends; at {boxed.median():.2f} of the nearest"
            f" side in the median, {boxed.min():.2f} to {boxed.max():.2f}",
        )
        change = ends.end_sharpness / ends.start_sharpness
        grows = ends.start_exponent > SURE * ends.start_error
        falls = ends.start_exponent < -SURE * ends.start_error
        yield all_of(
            "where the exponent is positive SGD leaves for a flatter minimum",
            change[grows] < 1,
            theory="it cannot stay",
            ours=f"sharpness at the end over the start {_range(change[grows])} in"
            f" {grows.sum()} runs",
        )
        yield all_of(
            "where the exponent is negative SGD stays",
            change[falls].between(RETURNED, 1 / RETURNED),
            theory="it can stay",
            ours=f"sharpness at the end over the start {_range(change[falls])} in"
            f" {falls.sum()} runs",
            tolerance=f"between {RETURNED:g} and {1 / RETURNED:.3g}, every one",
        )


def _range(values: Any) -> str:
    return f"{values.min():.2f} to {values.max():.2f}" if len(values) else "unknown"


EXPERIMENT = Settling
