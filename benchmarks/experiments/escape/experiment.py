"""Escape from a sharp minimum: Figures 1 and 8, and Table 3, of the paper.

Gradient descent trains to a minimum, where sharpness and non-uniformity are measured. From these
numbers the box (9) predicts, *before* a step is taken, whether SGD with several batch sizes at the same
learning rate, and gradient descent at larger ones, can stay. Then they run, and each prediction is
compared with the outcome. A run has escaped if the training loss rises tenfold, unless it returns to a
minimum as sharp as the first. All these minima and others found by SGD form a scatter plot of test
accuracy against sharpness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from benchmarks.experiments.escape import figures
from benchmarks.framework.claims import Claim, all_of, clearly_positive, close_to, spread
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.tables import Row
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset
from benchmarks.training.escape import Switch
from benchmarks.training.minimum import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Escape"]

PRINTED = {
    ("fashion-mnist", 0): {"sharpness": 19.7, "non_uniformity": 45.2, "test_accuracy": 0.8004},
    ("fashion-mnist", 200): {"sharpness": 19.9, "non_uniformity": 51.7, "test_accuracy": 0.7144},
}
"""Table 3: gradient descent at η = 0.1, by data set and number of random labels."""

TOLERANCE = 0.1

PAPER = {"seeds": (0, 1, 2, 3, 4), "target_loss": 1e-4, "settle_loss": 1e-4}

POINT = ["loss", "sharpness", "non_uniformity", "test_accuracy"]
"""The measurements of a minimum."""


@dataclass(frozen=True)
class Escape(Experiment):
    """Figures 1 and 8, Table 3.

    Attributes:
        lr: learning rate of gradient descent to the minimum, and of SGD from there.
        n: training images with true labels.
        random_labels: numbers of additional images with random labels, each with its own minimum.
        target_loss: training loss at which gradient descent stops.
        batch_sizes: batch sizes of SGD from the minimum.
        gd_lrs: learning rates of gradient descent from the minimum.
        steps: steps of SGD from the minimum.
        gd_steps: steps of gradient descent from the minimum.
        measure_every: steps between measurements along the way.
        settle_loss: training loss to which an escaped run continues, so that it ends in a minimum;
            ``None`` stops it after ``steps``.
        scatter_lrs: learning rates of the additional minima of the scatter plot.
        scatter_batch_sizes: their batch sizes.
        scatter_n: their training images with true labels: few, so that test accuracies differ.
        scatter_random_labels: their additional images with random labels.
        scatter_target_loss: training loss at which their training stops.
        scatter_seeds: their seeds; empty for ``seeds``.
    """

    name = "escape"
    shows = "Figures 1 and 8, Table 3"
    columns: ClassVar = {
        "minima": ("random_labels", "seed", "loss", "sharpness", "non_uniformity", "test_accuracy"),
        "switches": (
            *("how", "predicted", "escaped_at", "returned", "sharpness_after"),
            *("non_uniformity_after", "test_accuracy_after"),
        ),
        "traces": (),
        "scatter": (),
    }
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "target_loss": 0.01, "batch_sizes": (1, 50)},
            **{"steps": 60, "gd_steps": 20, "measure_every": 20},
            **{"scatter_lrs": (1.0,), "scatter_batch_sizes": (10, 25), "scatter_n": 100},
            **{"scatter_random_labels": 0, "scatter_target_loss": 0.01},
        },
        ("small", "digits"): {"seeds": (0, 1), "settle_loss": 3e-4},
        ("small", "fashion-mnist"): {
            **{"lr": 0.1, "random_labels": (0, 200), "target_loss": 1e-4, "settle_loss": 3e-4},
            **{"batch_sizes": (1, 4, 100), "gd_lrs": (0.3, 0.5)},
            **{"scatter_lrs": (0.1, 0.5, 1.0), "scatter_batch_sizes": (4, 25)},
            **{"seeds": (0, 1, 2), "scatter_seeds": (0, 1, 2, 3, 4)},
        },
        ("paper", "digits"): {**PAPER, "random_labels": (0, 150)},
        ("paper", "fashion-mnist"): {
            **{**PAPER, "lr": 0.1, "random_labels": (0, 200)},
            **{"batch_sizes": (1, 4, 100), "gd_lrs": (0.3, 0.5)},
            **{"scatter_n": 1000, "scatter_random_labels": 200, "scatter_target_loss": 1e-4},
            "scatter_lrs": (0.05, 0.1, 0.5, 1.0),
        },
    }

    lr: float = 0.5
    n: int = 1000
    random_labels: tuple[int, ...] = (0,)
    target_loss: float = 3e-4
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    gd_lrs: tuple[float, ...] = (1.5,)
    steps: int = 1000
    gd_steps: int = 200
    measure_every: int = 100
    settle_loss: float | None = None
    scatter_lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    scatter_batch_sizes: tuple[int, ...] = (4, 16, 64)
    scatter_n: int = 100
    scatter_random_labels: int = 20
    scatter_target_loss: float = 1e-3
    scatter_seeds: tuple[int, ...] = ()

    def _starts(self) -> list[Solution]:
        """Return the jobs of gradient descent's minima."""
        return [
            Solution(
                Dataset(self.data, self.n + count, count),
                lr=self.lr,
                seed=seed,
                target_loss=self.target_loss,
            )
            for count in self.random_labels
            for seed in self.seeds
        ]

    def _switches(self, start: Solution) -> list[Switch]:
        """Return the jobs of the runs from a minimum."""
        shared = {"measure_every": self.measure_every, "settle_loss": self.settle_loss}
        by_sgd = {"lr": self.lr, "steps": self.steps, "seed": start.seed}
        by_gd = {"batch_size": None, "steps": self.gd_steps, "look_every": 2}
        return [
            *(Switch(start, batch_size=size, **by_sgd, **shared) for size in self.batch_sizes),
            *(Switch(start, lr=lr, **by_gd, **shared) for lr in self.gd_lrs),
        ]

    def cases(self) -> dict[str, list[Case]]:
        """Return the minima, the runs from them, the first seed's traces, and the additional minima."""
        starts = self._starts()
        switches = [
            (switch, {"how": _how(switch), "lr": switch.lr, "batch_size": switch.batch_size})
            for start in starts
            for switch in self._switches(start)
        ]
        count = self.scatter_random_labels
        additional = [
            Solution(
                Dataset(self.data, self.scatter_n + count, count),
                lr=lr,
                seed=seed,
                batch_size=size,
                target_loss=self.scatter_target_loss,
                max_steps=100_000,
            )
            for lr in self.scatter_lrs
            for size in self.scatter_batch_sizes
            for seed in self.scatter_seeds or self.seeds
        ]
        return {
            "minima": [
                Case(job, {"random_labels": job.data.random_labels, "seed": job.seed, "lr": job.lr})
                for job in starts
            ],
            "switches": [
                Case(job, {**_labels(job), "seed": job.start.seed, **keys})
                for job, keys in switches
            ],
            "traces": [
                Case(job, {**_labels(job), **keys, "n": job.start.data.n})
                for job, keys in switches
                if job.start.seed == self.seeds[0]
            ],
            "scatter": [Case(job, {"from": "SGD from scratch"}) for job in additional],
        }

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return a minimum, a run with the measurements before and after it, or its trace."""
        if name == "traces":
            for record in [{**vars(result.before), "step": 0}, *store.trace(case.job)]:
                if "why" not in record and record["step"] <= case.job.steps:
                    yield case.keys | {key: record.get(key) for key in ("step", *POINT[:3])}
        elif name == "switches":
            keys = ("predicted", "why", "escaped_at", "settled_at", "largest_loss_ratio")
            row = case.keys | {key: getattr(result, key) for key in keys}
            row |= {"returned": result.returned, "right": result.as_predicted}
            for when, point in (("before", vars(result.before)), ("after", result.after or {})):
                row |= {f"{key}_{when}": point.get(key) for key in POINT}
            yield row
        elif name == "minima" or result.outcome == "reached":
            steps = {"steps": result.steps} if name == "minima" else {}
            yield case.keys | steps | {key: getattr(result, key) for key in POINT}

    def derived(self, tables: Tables) -> Tables:
        """Return the scatter plot's table with the minima and ends for the same training images."""
        count = self.scatter_random_labels
        if self.scatter_n != self.n or count not in self.random_labels:
            return {}  # accuracies are comparable only for the same training images
        parts = [tables["scatter"]] if "scatter" in tables else []
        for name, end in (("minima", ""), ("switches", "_after")):
            if name in tables:
                runs: Any = tables[name]
                runs = runs[runs.random_labels == count].dropna(subset=f"sharpness{end}")
                source = runs.how if end else "GD from scratch"
                point = runs[[f"{key}{end}" for key in POINT]].set_axis(POINT, axis=1)
                parts.append(point.assign(**{"from": source}))
        parts = [part for part in parts if len(part)]
        if not parts:
            return {}
        return {"scatter": pd.concat(parts, ignore_index=True)[["from", *POINT]]}

    def headline(self, job: Job, store: Store) -> str | None:
        """Return the prediction and outcome of a run, or the margins of a minimum."""
        if isinstance(job, Switch):
            result = store.result(job)
            observed = f"escaped at step {result.escaped_at}"
            if result.escaped_at is None:
                observed = f"stayed, the loss at most × {result.largest_loss_ratio:.1f}"
            mark = "[green]✓[/green]" if result.as_predicted else "[red]✗[/red]"
            outcome = f"predicted: {result.predicted} · observed: {observed}"
            return f"{mark} {_how(job)}, seed {job.seed}\n  {outcome}\n  {result.why}"
        if isinstance(job, Solution) and job in self._starts():
            result = store.result(job)
            a, s, limit = result.sharpness, result.non_uniformity, 2 / job.lr
            reached = f"loss {result.loss:.1e} in {result.steps:,} steps"
            return (
                f"GD, η = {job.lr:g}, seed {job.seed}: {reached}\n"
                f"    a = {a:.2f} (2/η = {limit:g}), s = {s:.2f}"
            )
        return None

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return loss and margins during the runs, or the scatter plot."""
        if name == "traces":
            return figures.traces(frame, self.lr)
        return figures.scatter(frame, self.data) if name == "scatter" else None

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield Table 3, the predictions, the ends of the escapes, and the correlation."""
        if "minima" in tables and self.lr == 0.1:
            for count, group in tables["minima"].groupby("random_labels", sort=False):
                for key, value in PRINTED.get((self.data, count), {}).items():
                    yield close_to(
                        f"Table 3, {key.replace('_', ' ')} of GD's minimum at η = 0.1,"
                        f" {count} random labels",
                        group[key],
                        value,
                        rel=TOLERANCE,
                        why="on the test images at hand" if key == "test_accuracy" else "",
                    )
        if "switches" in tables:
            switches: Any = tables["switches"]
            for how, group in switches.groupby("how", sort=False):
                yield _as_predicted(how, group)
            escapes = switches[~switches.returned].dropna(subset=["escaped_at", "sharpness_after"])
            if len(escapes):
                yield from _ends(escapes)
        if len(tables.get("scatter", ())) >= 4:
            yield _correlated(tables["scatter"])


def _how(switch: Switch) -> str:
    return f"{switch.how}, η = {switch.lr:g}"


def _labels(switch: Switch) -> dict[str, int]:
    return {"random_labels": switch.start.data.random_labels}


def _as_predicted(how: str, runs: Any) -> Claim:
    escape_steps = sorted(runs[~runs.returned].escaped_at.dropna())
    first_and_last = list(dict.fromkeys(escape_steps[:1] + escape_steps[-1:]))
    at = ""
    if first_and_last:
        plural = "s" if len(first_and_last) == 2 else ""
        at = f", at step{plural} {' to '.join(map(str, first_and_last))}"
    return all_of(
        f"Figure 8, {how} from GD's minimum",
        runs.right,
        theory=f"{' or '.join(sorted(set(runs.predicted)))}, predicted before a step",
        ours=f"{len(escape_steps)} of {len(runs)} escaped{at}",
        tolerance="each run as predicted",
        why="; ".join(map(_remark, runs[~runs.right | runs.returned].itertuples())),
    )


def _remark(row: Any) -> str:
    """Return a description of a run that was mispredicted, or that returned."""
    largest = row.largest_loss_ratio
    rose = "beyond all bounds" if pd.isna(largest) else f"{largest:.1f} times"
    text = f"seed {row.seed}, {row.random_labels} random labels: the loss rose {rose}"
    if pd.notna(row.sharpness_after):
        ratio = row.sharpness_after / row.sharpness_before
        text += f", and where it ended the sharpness is {ratio:.2f} of what it was"
        text += f" ({row.sharpness_before * row.lr / 2:.1%} of 2/η before)"
    return text


def _ends(escapes: Any) -> Iterator[Claim]:
    ratios = escapes.sharpness_after / escapes.sharpness_before
    yield all_of(
        "Figure 8, escapes end in flatter minima",
        ratios < 1,
        printed="sharpness falls",
        ours=f"sharpness after / before {ratios.min():.2f} to {ratios.max():.2f} in"
        f" {len(ratios)} escapes",
        why="; ".join(
            f"{row.how}, {row.random_labels} random labels: {ratio:.2f}"
            for row, ratio in zip(escapes.itertuples(), ratios, strict=True)
            if ratio >= 1
        ),
    )
    gains = 100 * (escapes.test_accuracy_after - escapes.test_accuracy_before)
    after, before = (
        f"{losses.min():.1e} to {losses.max():.1e}"
        for losses in (escapes.loss_after, escapes.loss_before)
    )
    yield all_of(
        "Figure 8, and they test better",
        [clearly_positive(gains)],
        printed="test accuracy rises",
        ours=f"{spread(gains, '+.2f', of='run')} percentage points",
        tolerance="the mean is two standard errors above 0",
        why=f"{(gains < 0).sum()} of {len(gains)} test worse; at training losses of {after}, those"
        f" before were {before}",
    )


def _correlated(models: Any) -> Claim:
    from scipy.stats import pearsonr

    correlation = pearsonr(np.log(models.sharpness), models.test_accuracy)
    low, high = correlation.confidence_interval()
    return all_of(
        "Figure 1, test accuracy against the logarithm of sharpness",
        [high < 0],
        printed="flatter minima test better",
        ours=f"correlation {correlation.statistic:.2f} (95 %: {low:.2f} to {high:.2f}),"
        f" {len(models)} models",
        tolerance="the interval is below 0",
    )


EXPERIMENT = Escape
