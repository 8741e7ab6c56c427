"""What follows L-BFGS: how accuracy grows with the steps of GD and SGD, and L-BFGS's own limit.

Two questions that Figure 9 leaves open. Does SGD gain accuracy after L-BFGS, and if not, is the budget
too short or are the data too clean? From L-BFGS's minima, with and without random labels, GD and SGD
train on for many more steps at every rate. And is L-BFGS within its own limit, on preconditioned
sharpness? One measurement at the end cannot say, since the preconditioner changes with each step: here
each of the last steps is measured, where the preconditioner was applied and where it led to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from benchmarks.experiments.after_lbfgs.jobs import Continued, LimitCourse
from benchmarks.experiments.quasi_newton.jobs import Budget, Training
from benchmarks.framework.claims import Claim, all_of, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import coloured, finish, limit, panels, trace
from benchmarks.framework.tables import Row
from benchmarks.runner import Store
from benchmarks.training.data import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "AfterLBFGS"]


@dataclass(frozen=True)
class AfterLBFGS(Experiment):
    """Training after L-BFGS.

    Attributes:
        n: training images.
        random_labels: how many of them get a random label; one minimum for each number.
        target_loss: training loss at which L-BFGS ends.
        max_steps: at which it ends in any case.
        lbfgs_lr: its rate.
        gd_lrs: rates of GD from its minimum.
        gd_steps: steps of GD.
        sgd_lrs: rates of SGD.
        sgd_steps: steps of SGD.
        batch_size: of SGD.
        last: steps of L-BFGS whose limit is measured.
    """

    name = "after-lbfgs"
    shows = "Beyond the paper"
    columns: ClassVar = {"courses": (), "limits": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "random_labels": (15,), "max_steps": 20, "target_loss": 0.02},
            **{"gd_lrs": (0.5,), "gd_steps": 120, "sgd_lrs": (0.3,), "sgd_steps": 120, "last": 3},
        },
        ("small", ""): {"seeds": (0, 1, 2), "max_steps": 1000},
        ("small", "fashion-mnist"): {
            **{"seeds": (0, 1, 2), "max_steps": 1000, "target_loss": 3e-3, "lbfgs_lr": 0.1},
            **{"gd_lrs": (0.3,), "gd_steps": 2000, "sgd_lrs": (0.1, 0.3), "last": 20},
            "sgd_steps": 10_000,
        },
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4), "random_labels": (0, 150, 300)},
    }

    n: int = 1000
    random_labels: tuple[int, ...] = (0, 150)
    target_loss: float = 1e-3
    max_steps: int = 2000
    lbfgs_lr: float = 1.0
    gd_lrs: tuple[float, ...] = (0.5, 1.0)
    gd_steps: int = 10_000
    sgd_lrs: tuple[float, ...] = (0.1, 0.3, 0.5)
    sgd_steps: int = 20_000
    batch_size: int = 16
    last: int = 60

    def cases(self) -> dict[str, list[Case]]:
        """Return the courses from each minimum, and those of L-BFGS's limit."""
        budget = Budget(self.target_loss, self.max_steps, batch_size=self.batch_size)
        starts = [
            (
                count,
                Training(Dataset(self.data, self.n, count), "L-BFGS", seed, budget, self.lbfgs_lr),
            )
            for count in self.random_labels
            for seed in self.seeds
        ]
        runs = [
            *(("GD", lr, None, self.gd_steps) for lr in self.gd_lrs),
            *(("SGD", lr, self.batch_size, self.sgd_steps) for lr in self.sgd_lrs),
        ]
        courses = [
            case(
                Continued(start, lr, size, steps),
                "lr",
                method=method,
                random_labels=count,
                seed=start.seed,
            )
            for count, start in starts
            for method, lr, size, steps in runs
        ]
        limits = [
            case(LimitCourse(start, self.last), random_labels=count, seed=start.seed)
            for count, start in starts
            if count == self.random_labels[-1]
        ]
        return {"courses": courses, "limits": limits}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return the looks on the way; of the courses also the gain since the start."""
        course = found["course"]
        if name == "limits":
            return [one.keys | at for at in course]
        shared = one.keys | {"diverged": found["diverged"]}
        return [shared | at | {"gain": at["test"] - course[0]["test"]} for at in course]

    def summary(self, tables: Tables) -> Tables:
        """Return the gains at the end, as means over seeds."""
        if "courses" not in tables:
            return {}
        keys = ["method", "lr", "random_labels"]
        its = _ends(tables["courses"]).groupby(keys, sort=False)
        return {"gains": its[["loss", "sharpness", "test", "gain"]].mean().reset_index()}

    def draw(self, name: str, its: pd.DataFrame) -> Figure:
        """Return accuracy against steps, a panel for each number of random labels; or the limits."""
        if name == "limits":
            figure, (axes,) = panels(width=5.5)
            for seed, colour in coloured(its.seed):
                run = its[its.seed == seed]
                back = run.step - run.step.max()
                trace(axes, back, run.applied, f"seed {seed}", colour)
            limit(axes, y=1.0)
            finish(axes, "steps before the end", "preconditioned sharpness / its limit", log="y")
            return figure
        counts = list(dict.fromkeys(its.random_labels))
        figure, axes = panels(len(counts), sharey=False)
        for panel, count in zip(axes, counts, strict=True):
            here = its[(its.random_labels == count) & ~its.diverged]
            names = here.method + ", η = " + here.lr.map("{:g}".format)
            for label, colour in coloured(names):
                mean = here[names == label].groupby("step").gain.mean()
                trace(
                    panel,
                    mean.index.to_numpy(),
                    100 * mean,
                    label,
                    colour,
                    marker="o",
                    markersize=3,
                )
            limit(panel, y=0.0)
            title = f"{count} of {self.n} labels random"
            y = "gain of test accuracy, points" if panel is axes[0] else ""
            finish(panel, "steps after L-BFGS", y, log="x", title=title, legend=panel is axes[0])
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return the gain of each method, with random labels and without, and the limit's course."""
        if "courses" in tables:
            ends = _ends(tables["courses"])
            for (method, count), its in ends.groupby(["method", "random_labels"], sort=False):
                yield _gains(str(method), int(count), its, tables["courses"])
        if "limits" in tables:
            yield _limit(tables["limits"])


def _ends(courses: Any) -> Any:
    keys = ["method", "lr", "random_labels", "seed"]
    kept = courses[~courses.diverged]
    return kept.loc[kept.groupby(keys, sort=False).step.idxmax()]


def _gains(method: str, count: int, its: Any, courses: Any) -> Claim:
    """Return the gain at the best of the rates at which the fewest seeds diverge."""
    own: Any = courses[(courses.method == method) & (courses.random_labels == count)]
    lost = own[own.diverged].groupby("lr").seed.nunique()
    rates = [(-lost.get(lr, 0), at.gain.mean(), at) for lr, at in its.groupby("lr", sort=False)]
    minus, _, best = max(rates, key=lambda rate: rate[:2])
    gains = 100 * best.gain
    error = gains.std() / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    rate, last = best.lr.iloc[0], int(best.step.iloc[0])
    kept: Any = own[(own.lr == rate) & ~own.diverged]
    highest = int(kept.groupby("step").gain.mean().idxmax())
    on_the_way = spread(100 * kept[kept.step == highest].gain, "+.2f")
    return all_of(
        f"{method} after L-BFGS tests better in the end, {count} labels random",
        [gains.mean() > 2 * error and not minus],
        theory="the flatter minimum tests better, Figure 9",
        ours=f"{spread(gains, '+.2f')} points after {last:,} steps at η = {rate:g}; most after"
        f" {highest:,}: {on_the_way}",
        tolerance="the mean gain is two standard errors above 0, and no seed diverges",
        why=f"training loss {best.loss.mean():.1e} at the end; from"
        f" {spread(100 * (best.test - best.gain), '.1f')} %"
        + (f"; {-minus} of {len(gains) - minus} seeds diverged" if minus else ""),
    )


def _limit(limits: Any) -> Claim:
    above = limits.applied > 1
    by_seed = limits.groupby("seed", sort=False)
    medians = by_seed.applied.median()
    runs = [
        len(list(steps))
        for _, its in by_seed
        for beyond, steps in groupby(its.applied > 1)
        if beyond
    ]
    return all_of(
        "The typical step of L-BFGS is within its own limit",
        medians <= 1,
        theory="a step beyond the limit grows only while the same direction stays beyond it",
        ours=f"median {spread(medians)} of it, in single steps {limits.applied.min():.2g} to"
        f" {limits.applied.max():.2g}; {above.mean():.0%} of {len(limits)} steps are above it,"
        f" at most {max(runs, default=0)} in a row",
        tolerance="the median, every seed",
        why=f"with the Hessian where the step led to the median is {spread(by_seed.after.median())}",
    )


EXPERIMENT = AfterLBFGS
