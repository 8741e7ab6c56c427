"""Escape from a sharp minimum: Figures 1 and 8, and Table 3, of the paper.

Gradient descent trains to a minimum, where sharpness and non-uniformity are measured. For SGD of
several batch sizes at the same learning rate, and gradient descent at larger ones, the box (9) then
says, *before* a step is taken, whether they can stay; they are run, and what they did is set beside
what was said. All minima and ends, with others found by SGD, make a scatter of test accuracy
against sharpness.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.experiments.escape import figures as escape_figures
from benchmarks.framework.experiment import Claim, RowExperiment, Rows, spread
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

POINT = ("loss", "sharpness", "non_uniformity", "test_accuracy")


@dataclass(frozen=True)
class Escape(RowExperiment):
    """Figures 1 and 8, Table 3.

    Attributes:
        lr: learning rate of gradient descent to the minimum, and of SGD from there.
        n: training images with their own labels.
        random_labels: how many more with random ones; one minimum for each number.
        target_loss: at which gradient descent stops.
        batch_sizes: of SGD from the minimum.
        gd_lrs: learning rates of gradient descent from the minimum.
        steps: of SGD from the minimum.
        gd_steps: of gradient descent from the minimum.
        measure_every: steps between measurements along the way.
        settle_loss: to which a run that escaped trains on, so that its end is a minimum; ``None``
            does not.
        scatter_lrs: learning rates of the further minima of the scatter.
        scatter_batch_sizes: their batch sizes.
        scatter_n: their training images with their own labels, few enough for test accuracy to
            differ.
        scatter_random_labels: how many more with random ones.
        scatter_target_loss: at which their training stops.
    """

    name = "escape"
    shows = "Figures 1 and 8, Table 3"
    columns: ClassVar = {
        "minima": ("random_labels", "seed", "loss", "sharpness", "non_uniformity", "test_accuracy"),
        "switches": (
            "how",
            "predicted",
            "escaped_at",
            "settled_at",
            "sharpness_after",
            "non_uniformity_after",
            "test_accuracy_after",
        ),
        "traces": (),
        "scatter": (),
    }
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 100,
            "target_loss": 0.01,
            "batch_sizes": (1, 50),
            "steps": 60,
            "gd_steps": 20,
            "measure_every": 20,
            "scatter_lrs": (1.0,),
            "scatter_batch_sizes": (10, 25),
            "scatter_n": 100,
            "scatter_random_labels": 0,
            "scatter_target_loss": 0.01,
        },
        ("small", "digits"): {"seeds": (0, 1), "settle_loss": 3e-4},
        ("small", "fashion-mnist"): {
            "lr": 0.1,
            "random_labels": (0, 200),
            "target_loss": 1e-4,
            "settle_loss": 3e-4,
            "batch_sizes": (1, 4, 100),
            "gd_lrs": (0.3, 0.5),
            "scatter_lrs": (0.1, 0.5, 1.0),
            "scatter_batch_sizes": (4, 25),
        },
        ("paper", "digits"): {
            "seeds": (0, 1, 2, 3, 4),
            "target_loss": 1e-4,
            "settle_loss": 1e-4,
            "random_labels": (0, 150),
        },
        ("paper", "fashion-mnist"): {
            "seeds": (0, 1, 2, 3, 4),
            "lr": 0.1,
            "random_labels": (0, 200),
            "target_loss": 1e-4,
            "settle_loss": 1e-4,
            "batch_sizes": (1, 4, 100),
            "gd_lrs": (0.3, 0.5),
            "scatter_n": 1000,
            "scatter_random_labels": 200,
            "scatter_target_loss": 1e-4,
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

    def _starts(self) -> list[Solution]:
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
        by_sgd = [
            Switch(
                start,
                lr=self.lr,
                batch_size=size,
                steps=self.steps,
                seed=start.seed,
                measure_every=self.measure_every,
                settle_loss=self.settle_loss,
            )
            for size in self.batch_sizes
        ]
        by_gd = [
            Switch(
                start,
                lr=lr,
                batch_size=None,
                steps=self.gd_steps,
                look_every=2,
                measure_every=self.measure_every,
                settle_loss=self.settle_loss,
            )
            for lr in self.gd_lrs
        ]
        return by_sgd + by_gd

    def _others(self) -> list[Solution]:
        count = self.scatter_random_labels
        return [
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
            for seed in self.seeds
        ]

    def jobs(self) -> list[Job]:
        """Return the runs from the minima, and the further minima."""
        return [s for start in self._starts() for s in self._switches(start)] + list(self._others())

    def headline(self, job: Job, store: Store) -> str | None:
        """Return what was predicted of a run, and whether it came true; what a minimum is like."""
        if isinstance(job, Switch):
            found = store.result(job)
            right = found.as_predicted
            at, largest = found.escaped_at, found.largest_loss_ratio
            done = (
                f"escaped at step {at}"
                if at is not None
                else f"stayed, the loss at most × {largest:.1f}"
            )
            mark = "[green]✓[/green]" if right else "[red]✗[/red]"
            told = f"predicted: {found.predicted} · observed: {done}"
            return f"{mark} {_how(job)}, seed {job.seed}\n  {told}\n  {found.why}"
        if isinstance(job, Solution) and job in self._starts():
            found = store.result(job)
            a, s, limit = found.sharpness, found.non_uniformity, 2 / job.lr
            reached = f"loss {found.loss:.1e} in {found.steps:,} steps"
            return (
                f"GD, η = {job.lr:g}, seed {job.seed}: {reached}\n"
                f"    a = {a:.2f} (2/η = {limit:g}), s = {s:.2f}"
            )
        return None

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``minima``, ``switches``, ``traces`` of the first seed, and ``scatter``."""
        minima: Rows = []
        switches: Rows = []
        traces: Rows = []
        for start in filter(store.done, self._starts()):
            found = store.result(start)
            minima.append(_minimum(start, found))
            for switch in filter(store.done, self._switches(start)):
                switches.append(_switched(switch, store.result(switch)))
                if start.seed == self.seeds[0]:
                    traces += list(_traced(switch, found, store.trace(switch)))
        scatter = [
            {"from": "SGD from scratch", **_point(store.result(other))}
            for other in filter(store.done, self._others())
            if store.result(other).outcome == "reached"
        ]
        # A scatter is of models trained on the same images: only there do accuracies compare.
        if self.scatter_n == self.n and self.scatter_random_labels in self.random_labels:
            scatter += list(_ends(minima, switches, self.scatter_random_labels))
        return {"minima": minima, "switches": switches, "traces": traces, "scatter": scatter}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return loss and margins along the way, and the scatter."""
        if name == "traces":
            return escape_figures.traces(rows, self.lr)
        if name == "scatter":
            return escape_figures.scatter(rows, self.data)
        return None

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return Table 3, who left and who stayed, and what the ends are like."""
        return [
            *self._table_3(tables["minima"]),
            *self._who_left(tables["switches"]),
            *_ends_flatter(tables["switches"]),
            *_correlated(tables.get("scatter", [])),
        ]

    def _table_3(self, minima: Rows) -> Iterator[Claim]:
        for count in self.random_labels:
            printed = PRINTED.get((self.data, count), {})
            rows = [r for r in minima if r["random_labels"] == count]
            if not rows or self.lr != 0.1:
                continue
            for key, value in printed.items():
                values = [r[key] for r in rows]
                away = mean(values) / value - 1
                yield Claim(
                    what=f"Table 3, {key.replace('_', ' ')} of GD's minimum at η = 0.1,"
                    f" {count} random labels",
                    printed=f"{value:g}",
                    ours=spread(values, ".4g"),
                    tolerance=f"{TOLERANCE:.0%}",
                    reproduced=abs(away) <= TOLERANCE,
                    why=f"{away:+.1%}"
                    + ("; on the test images at hand" if key == "test_accuracy" else ""),
                )

    def _who_left(self, switches: Rows) -> Iterator[Claim]:
        for how in dict.fromkeys(r["how"] for r in switches):
            rows = [r for r in switches if r["how"] == how]
            said = sorted({r["predicted"] for r in rows})
            left = [r["escaped_at"] for r in rows if r["escaped_at"] is not None]
            right = sum(r["right"] for r in rows)
            times = f", by step {min(left)} to {max(left)}" if left else ""
            yield Claim(
                what=f"Figure 8, {how} from GD's minimum",
                printed=f"predicted here, before a step: {' or '.join(said)}",
                ours=f"{len(left)} of {len(rows)} escaped{times}",
                tolerance="each run as predicted",
                reproduced=right == len(rows),
                why="; ".join(_miss(r) for r in rows if not r["right"]),
            )


def _miss(row: dict[str, Any]) -> str:
    text = f"seed {row['seed']}, {row['random_labels']} random labels: the loss rose"
    text += f" {row['largest_loss_ratio']:.1f} times"
    if row["sharpness_after"] is not None:
        ratio = row["sharpness_after"] / row["sharpness_before"]
        text += f", and where it ended the sharpness is {ratio:.2f} of what it was"
        share = row["sharpness_before"] * row["lr"] / 2
        text += f" ({share:.1%} of 2/η before)"
    return text


def _minimum(start: Solution, found: Any) -> dict[str, Any]:
    return {
        "random_labels": start.data.random_labels,
        "seed": start.seed,
        "lr": start.lr,
        "steps": found.steps,
        **_point(found),
    }


def _point(found: Any) -> dict[str, Any]:
    return {key: getattr(found, key) for key in POINT}


def _how(switch: Switch) -> str:
    return f"{switch.how}, η = {switch.lr:g}"


def _switched(switch: Switch, found: Any) -> dict[str, Any]:
    row = {
        "random_labels": switch.start.data.random_labels,
        "seed": switch.start.seed,
        "how": _how(switch),
        "lr": switch.lr,
        "batch_size": switch.batch_size,
        "predicted": found.predicted,
        "why": found.why,
        "escaped_at": found.escaped_at,
        "settled_at": found.settled_at,
        "largest_loss_ratio": found.largest_loss_ratio,
        "right": found.as_predicted,
    }
    ends = {"before": vars(found.before), "after": found.after or {}}
    for when in ("before", "after"):
        for key in ("loss", "sharpness", "non_uniformity", "test_accuracy"):
            row[f"{key}_{when}"] = ends[when].get(key)
    return row


def _traced(switch: Switch, before: Any, trace: Rows) -> Iterator[dict[str, Any]]:
    for record in [{**vars(before), "step": 0}, *trace]:
        if "why" in record or record["step"] > switch.steps:
            continue
        yield {
            "random_labels": switch.start.data.random_labels,
            "how": _how(switch),
            "lr": switch.lr,
            "batch_size": switch.batch_size,
            "n": switch.start.data.n,
            **{key: record.get(key) for key in ("step", "loss", "sharpness", "non_uniformity")},
        }


def _ends(minima: Rows, switches: Rows, count: int) -> Iterator[dict[str, Any]]:
    for row in minima:
        if row["random_labels"] == count:
            yield {"from": "GD from scratch", **{key: row[key] for key in POINT}}
    for row in switches:
        if row["random_labels"] == count and row["sharpness_after"] is not None:
            after = {key: row[f"{key}_after"] for key in ("loss", "sharpness", "non_uniformity")}
            yield {"from": row["how"], **after, "test_accuracy": row["test_accuracy_after"]}


def _ends_flatter(switches: Rows) -> Iterator[Claim]:
    left = [r for r in switches if r["escaped_at"] is not None and r["sharpness_after"] is not None]
    if not left:
        return
    by = [r["sharpness_after"] / r["sharpness_before"] for r in left]
    yield Claim(
        what="Figure 8, escapes end in flatter minima",
        printed="sharpness falls",
        ours=f"sharpness after / before {min(by):.2f} to {max(by):.2f} in {len(by)} escapes",
        tolerance="every one",
        reproduced=max(by) < 1,
        why="; ".join(
            f"{r['how']}, {r['random_labels']} random labels: {ratio:.2f}"
            for r, ratio in zip(left, by, strict=True)
            if ratio >= 1
        ),
    )
    gains = [100 * (r["test_accuracy_after"] - r["test_accuracy_before"]) for r in left]
    lost = sum(g < 0 for g in gains)
    losses = [r["loss_after"] for r in left]
    from_losses = [r["loss_before"] for r in left]
    yield Claim(
        what="Figure 8, and they test better",
        printed="test accuracy rises",
        ours=f"{spread(gains, '+.2f')} percentage points",
        tolerance="mean above 0",
        reproduced=mean(gains) > 0,
        why=f"{lost} of {len(gains)} test worse; at training losses of {min(losses):.1e} to"
        f" {max(losses):.1e}, those before were {min(from_losses):.1e} to {max(from_losses):.1e}",
    )


def _correlated(scatter: Rows) -> Iterator[Claim]:
    from scipy.stats import pearsonr

    if len(scatter) < 4:
        return
    found = pearsonr(
        [math.log(r["sharpness"]) for r in scatter], [r["test_accuracy"] for r in scatter]
    )
    low, high = found.confidence_interval()
    yield Claim(
        what="Figure 1, test accuracy against the logarithm of sharpness",
        printed="flatter minima test better",
        ours=f"correlation {found.statistic:.2f} (95 %: {low:.2f} to {high:.2f}), {len(scatter)} models",
        tolerance="the interval is below 0",
        reproduced=bool(high < 0),
    )


EXPERIMENT = Escape
