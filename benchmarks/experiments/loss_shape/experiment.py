"""The loss around its minima: how far a quadratic, and none for cross-entropy. Figure 4 of the paper.

We read that figure as: what the loss looks like around a minimum. At minima of gradient descent with
the squared loss, the loss along the top eigenvector of the Hessian is set beside its quadratic, which
is what linear stability speaks of: how much may it rise before the two part by a tenth? And gradient
descent trains with either loss: with the squared one the sharpness rises towards 2/η while the loss
falls; with cross-entropy it falls to zero together with the loss, so that at its infimum no learning
rate is too large, and linear stability selects nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.experiments.loss_shape.jobs import LOSSES, WITHIN, Course, Line
from benchmarks.framework.experiment import Claim, RowExperiment, Rows, spread
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "LossShape"]

VERMILION, BLUE = "#D55E00", "#0072B2"
COLOURS = {"squared": BLUE, "cross-entropy": VERMILION}


@dataclass(frozen=True)
class LossShape(RowExperiment):
    """Figure 4, as we read it.

    Attributes:
        lrs: learning rates of the minima.
        n: training images.
        target_loss: of the minima.
        max_steps: at which their training stops in any case.
        course_lr: learning rate of the training by either loss.
        course_steps: its steps.
        looks: measurements on its way.
    """

    name = "loss-shape"
    shows = "Figure 4, as we read it"
    datasets = ("digits", "fashion-mnist")
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "lrs": (1.0,), "target_loss": 0.02},
            **{"course_steps": 100, "looks": 6},
        },
        ("small", "digits"): {"target_loss": 1e-3, "lrs": (0.5, 2.0), "course_steps": 3000},
        ("small", "fashion-mnist"): {"target_loss": 1e-3, "lrs": (0.5,), "looks": 12},
        ("paper", "digits"): {"seeds": (0, 1, 2, 3, 4), "course_steps": 40_000, "looks": 30},
        ("paper", ""): {
            **{"seeds": (0, 1, 2), "lrs": (0.1, 0.5, 1.0), "course_lr": 0.1},
            **{"course_steps": 40_000, "looks": 30},
        },
    }

    lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    n: int = 1000
    target_loss: float = 1e-4
    max_steps: int = 1_000_000
    course_lr: float = 0.5
    course_steps: int = 4000
    looks: int = 16

    def _lines(self) -> list[Line]:
        return [
            Line(
                Solution(
                    Dataset(self.data, self.n),
                    lr=lr,
                    seed=seed,
                    target_loss=self.target_loss,
                    max_steps=self.max_steps,
                )
            )
            for lr in self.lrs
            for seed in self.seeds
        ]

    def _courses(self) -> list[Course]:
        data = Dataset(self.data, self.n)
        return [
            Course(data, loss, self.course_lr, seed, self.course_steps, self.looks)
            for loss in LOSSES
            for seed in self.seeds
        ]

    def jobs(self) -> list[Job]:
        """Return a line through each minimum, and the courses."""
        return [*self._lines(), *self._courses()]

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``minima``, ``line`` through them, and ``course``."""
        minima, line = [], []
        for job in filter(store.done, self._lines()):
            found = store.result(job)
            which = {"lr": job.start.lr, "seed": job.start.seed}
            keys = ("loss", "sharpness", "slope", "trusted_rise")
            minima.append({**which, **{key: found[key] for key in keys}})
            points = zip(found["t"], found["losses"], found["quadratic"], strict=True)
            line += [{**which, "t": t, "loss": v, "quadratic": q} for t, v, q in points]
        course = [
            {"trained_by": job.loss, "lr": job.lr, "seed": job.seed, **look}
            for job in filter(store.done, self._courses())
            for look in store.result(job)["course"]
        ]
        return {"minima": minima, "line": line, "course": course}

    def row_summary(self, tables: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return the minima, and where the courses end."""
        return {"minima": tables["minima"], "course-ends": _ends(tables["course"])}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return the loss beside its quadratic, or sharpness against loss on the way."""
        from matplotlib.figure import Figure

        if name == "minima":
            return None
        if name == "course":
            figure = Figure(figsize=(5.5, 4), layout="constrained")
            _draw_course(figure.subplots(), rows)
            return figure
        lrs = list(dict.fromkeys(row["lr"] for row in rows))
        figure = Figure(figsize=(3.6 * len(lrs), 3.4), layout="constrained")
        for axes, lr in zip(figure.subplots(1, len(lrs), squeeze=False)[0], lrs, strict=True):
            its = [row for row in rows if row["lr"] == lr and row["seed"] == rows[0]["seed"]]
            t = [row["t"] for row in its]
            axes.plot(t, [row["loss"] for row in its], color=BLUE, label="loss")
            quadratic = [row["quadratic"] for row in its]
            axes.plot(t, quadratic, "--", color="black", linewidth=1, label="quadratic")
            axes.set(xlabel="along the top eigenvector", title=f"η = {lr:g}")
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("squared loss")
        figure.axes[0].legend(frameon=False)
        return figure

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return how far the quadratic holds, and where sharpness goes by either loss."""
        claims = []
        if tables.get("minima"):
            claims.append(_on_lines(tables["minima"]))
        ends = _ends(tables.get("course", []))
        for loss in LOSSES:
            its = [row for row in ends if row["trained_by"] == loss]
            if its:
                claims.append(_on_courses(loss, its))
        return claims


def _on_lines(rows: Rows) -> Claim:
    rises = [math.inf if r["trusted_rise"] is None else r["trusted_rise"] for r in rows]
    tenfold = sum(rise >= 9 for rise in rises)
    return Claim(
        what="around a minimum the loss is its quadratic, along the top eigenvector",
        printed="the assumption of linear stability",
        ours=f"until the loss has risen by {min(rises):.2g} to {max(rises):.2g} times itself, at"
        f" {len(rows)} minima",
        tolerance=f"{WITHIN:.0%} of the quadratic until the loss has doubled",
        reproduced=min(rises) >= 1,
        why=f"until it has risen tenfold, which counts as an escape: {tenfold} of {len(rows)}",
    )


def _ends(rows: Rows) -> Rows:
    """Return where each course of training ended, beside its sharpest point."""
    courses: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        if row["sharpness"] is not None:
            courses.setdefault((row["trained_by"], row["seed"]), []).append(row)
    return [
        {
            **{key: its[-1][key] for key in ("trained_by", "seed", "step", "loss", "sharpness")},
            "limit": 2 / its[-1]["lr"],
            "highest": max(row["sharpness"] for row in its),
            "slope": _slope(its),
        }
        for its in courses.values()
    ]


def _slope(rows: Rows) -> float | None:
    """Return d log(sharpness)/d log(loss) over the last decade of the loss."""
    last = [row for row in rows if row["loss"] <= 10 * rows[-1]["loss"]]
    if len(last) < 3:
        return None
    loss, sharpness = (np.log([row[key] for row in last]) for key in ("loss", "sharpness"))
    return float(np.polyfit(loss, sharpness, 1)[0])


def _on_courses(loss: str, ends: Rows) -> Claim:
    limit = ends[0]["limit"]
    shares = [row["sharpness"] / limit for row in ends]
    slopes = [row["slope"] for row in ends if row["slope"] is not None]
    at = mean(row["loss"] for row in ends)
    slope = spread(slopes, ".2f") if slopes else "not known"
    ours = (
        f"a is {spread(shares, '.2f')} of 2/η at a loss of {at:.1e}; it goes as the loss to the"
        f" power {slope}"
    )
    if loss == "squared":
        return Claim(
            what="with the squared loss the sharpness does not vanish with the loss",
            printed=f"rises to 2/η = {limit:g}",
            ours=ours,
            tolerance="half of 2/η to 5 % above it",
            reproduced=all(0.5 <= share <= 1.05 for share in shares),
            why="progressive sharpening goes on as long as the loss falls",
        )
    fallen = [row["sharpness"] / row["highest"] for row in ends]
    return Claim(
        what="with cross-entropy the sharpness vanishes with the loss",
        printed="a → 0",
        ours=f"{ours}; {spread(fallen, '.1%')} of its highest",
        tolerance="less than a tenth of its highest; power above 0.5",
        reproduced=max(fallen) < 0.1 and bool(slopes) and min(slopes) > 0.5,
        why="the curvature of cross-entropy in the outputs is at most 2(1 − p), p the probability"
        " given to the right class",
    )


def _draw_course(axes: Any, rows: Rows) -> None:
    lr = rows[0]["lr"]
    for loss, colour in COLOURS.items():
        for seed in dict.fromkeys(row["seed"] for row in rows):
            its = [r for r in rows if (r["trained_by"], r["seed"]) == (loss, seed)]
            its = [row for row in its if row["sharpness"] is not None]
            axes.plot(
                [row["loss"] for row in its],
                [row["sharpness"] for row in its],
                "o-",
                color=colour,
                markersize=3,
                linewidth=1,
                label=loss if seed == rows[0]["seed"] else None,
            )
    axes.axhline(2 / lr, color="black", linestyle="--", linewidth=1, label=f"2/η, η = {lr:g}")
    axes.set(xscale="log", yscale="log", xlabel="training loss", ylabel="sharpness a")
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


EXPERIMENT = LossShape
