"""Does the mean-square threshold limit where SGD settles, or the almost sure one? Beyond the paper.

From each of several minima SGD continues, with and without momentum, at learning rates around the
minimum's exact mean-square threshold, until the loss is a thousandth of the initial one. At the end, the
threshold and the Lyapunov exponent are computed again. Above the mean-square threshold the second moment
grows, but only through rare runs. A typical run grows at the rate of the exponent, so SGD can converge
as long as that is negative: the exponent, not the second moment, should limit where SGD settles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import stableopt
from benchmarks.framework.claims import Claim, all_of, at_most
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
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
"""Standard errors from zero at which an exponent's sign counts as known; about a hundred are judged."""


@dataclass(frozen=True)
class Settled:
    """The start and the end of a run of SGD.

    Attributes:
        lr: learning rate.
        outcome: ``"reached"``, ``"diverged"`` or ``"out of steps"``. The ``end_`` numbers exist only for
            the first.
        steps: number of steps taken.
        largest_loss_ratio: largest over initial training loss; ``None`` if not finite.
        start_sharpness: sharpness of the Gauss–Newton matrix at the start.
        start_exponent: Lyapunov exponent of the update at the start, per step.
        start_error: its standard error.
        end_sharpness: sharpness at the end.
        end_non_uniformity: non-uniformity at the end.
        end_box: the larger of the two, relative to their limits in the box (9) at this learning rate.
        end_ratio: learning rate over the exact mean-square threshold at the end.
        end_exponent: Lyapunov exponent at the end.
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
        thresholds: thresholds of the minimum, with the update rule.
        ratio: learning rate over the exact threshold of the minimum.
        batch_size: batch size.
        target_loss: training loss at which the run has settled.
        max_steps: largest number of steps.

    The result is a :class:`Settled`; the weights are saved.
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
        """About 20,000 steps, and the evaluations of the loss, each a third of a gradient."""
        data = self.thresholds.start.data
        samples = 20_000 * (self.batch_size + data.n / LOOK_EVERY / 3)
        return samples * flops_per_sample(data.name, self.thresholds.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Measure, train, measure again."""
        update = self.thresholds.update
        lr = self.ratio * work.result(self.thresholds).at(self.batch_size).critical_lr
        start = from_minimum(self.thresholds.start, work)
        dual = curvature_of(start, update)
        exponent = self._exponent(dual, lr)
        result = {"lr": lr, "start_sharpness": dual.sharpness}
        result |= {"start_exponent": exponent.per_step, "start_error": exponent.standard_error}

        _, model, images = start
        first_loss = loss = largest_loss = evaluate(model, images)

        def after_step(step: int, batch_loss: float) -> bool:
            nonlocal loss, largest_loss
            if step % LOOK_EVERY:
                return False
            loss = evaluate(model, images)
            largest_loss = max(largest_loss, loss) if loss < math.inf else math.inf
            work.progress(step / self.max_steps, f"step {step:,}, loss {loss:.1e}")
            return loss <= self.target_loss or not loss < math.inf

        generator = torch.Generator().manual_seed(0)
        batches = independent_batches(images, self.batch_size, generator)
        optimizer = update.optimizer(model, images, lr)
        steps = train(model, optimizer, batches, steps=self.max_steps, after_step=after_step)
        work.save(model.state_dict())
        result |= {"steps": steps, "largest_loss_ratio": largest_loss / first_loss}
        if not loss < math.inf:
            return {**result, "outcome": "diverged", "largest_loss_ratio": None}
        if loss > self.target_loss:
            return {**result, "outcome": "out of steps"}

        dual = curvature_of(start, update)
        critical = stableopt.critical_lr(
            dual, batch_size=self.batch_size, update_rule=update.rule(1.0)
        )
        end_exponent = self._exponent(dual, lr)
        result |= {**self.of_end(dual, lr), "end_ratio": lr / critical.value}
        result |= {"end_exponent": end_exponent.per_step, "end_error": end_exponent.standard_error}
        return {**result, "outcome": "reached"}

    def of_end(self, dual: stableopt.curvature.DualCurvature, lr: float) -> dict[str, float]:
        """Return sharpness and non-uniformity at the end, and the larger relative to its limit."""
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
        lrs: learning rates of the gradient descents that find the minima.
        n: training images: few, since the cost of the thresholds grows as (nC)^3.
        start_loss: training loss at which gradient descent stops.
        target_loss: training loss at which SGD stops.
        max_steps: largest number of SGD's steps.
        batch_sizes: batch sizes of SGD.
        ratios: learning rates of SGD, over the exact threshold of the minimum.
    """

    name = "settling"
    shows = "Beyond the paper"
    datasets = ("digits",)
    columns: ClassVar = {"settled": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 8,
            "lrs": (1.0,),
            "start_loss": 3e-3,
            "target_loss": 1e-3,
            "max_steps": 2000,
            "batch_sizes": (4,),
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
        cases = []
        for (name, update), start in itertools.product(UPDATES.items(), starts):
            thresholds = Thresholds(start, self.batch_sizes, update)
            keys = {"update": name, "minimum_lr": start.lr, "seed": start.seed}
            for size, ratio in itertools.product(self.batch_sizes, self.ratios):
                run = SettlingRun(thresholds, ratio, size, self.target_loss, self.max_steps)
                cases.append(case_of(run, "batch_size", "ratio", **keys))
        return {"settled": cases}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return learning rate over threshold at the end, against the same ratio at the start."""
        figure, axes = panels(len(UPDATES), height=3.8, sharey=True)
        for index, (panel, update) in enumerate(zip(axes, UPDATES, strict=True)):
            settled: Any = frame[frame["update"] == update].dropna(subset="end_ratio")
            for size, colour in coloured(sorted(settled.batch_size.unique())):
                runs = settled[settled.batch_size == size]
                # A small horizontal offset, so that marks do not overlap.
                x = runs.ratio * (1 + 0.02 * (list(self.batch_sizes).index(size) - 1))
                style = {"markersize": 5, "fillstyle": "none"}
                points(panel, x, runs.end_ratio, f"B = {size}", colour, **style)
            limit(panel, y=1, label="mean-square threshold")
            y = "" if index else "η/η* where it settled"
            finish(panel, "η/η* at the start", y, log="x", title=update, ticks=self.ratios)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield which thresholds hold where SGD settles, and whether the exponent predicts escapes."""
        if "settled" not in tables:
            return
        runs = tables["settled"]
        ends: Any = runs.dropna(subset="end_ratio")
        if not len(ends):
            return
        counts = runs.outcome[runs.outcome != "reached"].value_counts().to_dict()
        lost = "; ".join(f"{outcome}: {count}" for outcome, count in counts.items())
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
        shares = ends.end_box
        yield at_most(
            "SGD settles within the box (9)",
            shares,
            1.0,
            "share of its nearest side",
            ours=f"{(shares <= 1).sum()} of {len(ends)} ends; at {shares.median():.2f} of the nearest"
            f" side in the median, {shares.min():.2f} to {shares.max():.2f}",
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
