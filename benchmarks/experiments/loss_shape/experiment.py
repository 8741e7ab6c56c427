"""The loss around its minima, a quadratic or vanishing with cross-entropy: Figure 4 of the paper.

We read that figure as: what the loss looks like around a minimum. At minima of gradient descent with
the squared loss, the loss along the top eigenvector of the Hessian is compared with its quadratic, which
is what linear stability speaks of: how much may it rise before the two part by a tenth? And gradient
descent trains with either loss: with the squared one the sharpness rises towards 2/η while the loss
falls; with cross-entropy it falls to zero together with the loss, so that at its infimum no learning
rate is too large, and linear stability selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from benchmarks.experiments.loss_shape.jobs import LOSSES, WITHIN, Course, Line
from benchmarks.framework.claims import Claim, all_of, at_least, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import BLUE, VERMILION, finish, limit, panels, trace
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import minima

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "LossShape"]

COLOURS = {"squared": BLUE, "cross-entropy": VERMILION}


@dataclass(frozen=True)
class LossShape(Experiment):
    """Figure 4, as we read it.

    Attributes:
        lrs: learning rates of the minima.
        n: training images.
        target_loss: of the minima.
        max_steps: at which their training stops in any case.
        course_n: training images of the training by either loss; ``None`` for all of them.
        course_lr: its learning rate.
        course_steps: its steps.
        looks: measurements on its way.
    """

    name = "loss-shape"
    shows = "Figure 4, as we read it"
    columns: ClassVar = {"line": (), "course": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "lrs": (1.0,), "target_loss": 0.02},
            **{"course_steps": 100, "looks": 6},
        },
        ("small", "digits"): {"target_loss": 1e-3, "lrs": (0.5, 2.0), "course_steps": 3000},
        # A tenth of the images, so that cross-entropy gets the many steps that it takes to vanish, and
        # a rate at which it does not diverge.
        ("small", "fashion-mnist"): {
            **{"target_loss": 1e-3, "lrs": (0.5,), "looks": 16},
            **{"course_n": 100, "course_lr": 0.1, "course_steps": 40_000},
        },
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
    course_n: int | None = None
    course_lr: float = 0.5
    course_steps: int = 4000
    looks: int = 16

    def cases(self) -> dict[str, list[Case]]:
        """Return a line through each minimum, in two tables, and the courses."""
        data = Dataset(self.data, self.n)
        lines = [
            case(Line(one.job), lr=one.job.lr, seed=one.job.seed)
            for one in minima(self, data, lrs=self.lrs)
        ]
        seen = Dataset(self.data, self.course_n or self.n)
        courses = [
            Course(seen, loss, self.course_lr, seed, self.course_steps, self.looks)
            for loss in LOSSES
            for seed in self.seeds
        ]
        course = [case(job, trained_by=job.loss, lr=job.lr, seed=job.seed) for job in courses]
        return {"minima": lines, "line": lines, "course": course}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return the minimum, the points of the line, or the measurements of a course."""
        if name == "minima":
            keys = ("loss", "sharpness", "slope", "trusted_rise")
            return [one.keys | {key: found[key] for key in keys}]
        if name == "course":
            return [one.keys | at for at in found["course"]]
        along = zip(found["t"], found["losses"], found["quadratic"], strict=True)
        return [one.keys | {"t": t, "loss": loss, "quadratic": q} for t, loss, q in along]

    def summary(self, tables: Tables) -> Tables:
        """Return the minima, and where the courses end."""
        ends = {"course-ends": _ends(tables["course"])} if "course" in tables else {}
        return {**super().summary(tables), **ends}

    def draw(self, name: str, its: pd.DataFrame) -> Figure | None:
        """Return the loss and its quadratic, or sharpness against loss on the way."""
        if name == "minima":
            return None
        if name == "course":
            return _draw_course(its)
        its = its[its.seed == its.seed.iloc[0]]
        lrs = list(dict.fromkeys(its.lr))
        figure, axes = panels(len(lrs), width=3.6, height=3.4)
        for panel, lr in zip(axes, lrs, strict=True):
            each = its[its.lr == lr]
            trace(panel, each.t, each.loss, "loss")
            limit(panel, each.t, each.quadratic, "quadratic")
            first = panel is axes[0]
            y = "squared loss" if first else ""
            finish(panel, "along the top eigenvector", y, title=f"η = {lr:g}", legend=first)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return how far the quadratic holds, and where sharpness goes by either loss."""
        if "minima" in tables:
            rises = tables["minima"].trusted_rise.fillna(np.inf)  # it holds all the way
            yield at_least(
                "around a minimum the loss is its quadratic, along the top eigenvector",
                rises,
                1,
                printed="the assumption of linear stability",
                theory="",
                ours=f"until the loss has risen by {rises.min():.2g} to {rises.max():.2g} times"
                f" itself, at {len(rises)} minima",
                tolerance=f"{WITHIN:.0%} of the quadratic until the loss has doubled",
                why="until it has risen tenfold, which counts as an escape:"
                f" {(rises >= 9).sum()} of {len(rises)}",
            )
        if "course" in tables:
            for loss, its in _ends(tables["course"]).groupby("trained_by", sort=False):
                yield _on_courses(str(loss), its)


def _ends(course: Any) -> pd.DataFrame:
    """Return where each course of training ended, and its sharpest point."""
    rows = []
    known = course.dropna(subset="sharpness")
    for _, its in known.groupby(["trained_by", "seed"], sort=False):
        end = its.iloc[-1]
        keys = ("trained_by", "seed", "step", "loss", "sharpness")
        rows.append(
            {key: end[key] for key in keys}
            | {"limit": 2 / end.lr, "highest": its.sharpness.max(), "slope": _slope(its)}
        )
    return table(rows)


def _slope(its: Any) -> float | None:
    """Return d log(sharpness)/d log(loss) over the last decade of the loss."""
    last = its[its.loss <= 10 * its.loss.iloc[-1]]
    if len(last) < 3:
        return None
    logs = (np.log(last[key].to_numpy(float)) for key in ("loss", "sharpness"))
    return float(np.polyfit(*logs, 1)[0])


def _on_courses(loss: str, ends: Any) -> Claim:
    bound = ends.limit.iloc[0]
    shares = ends.sharpness / ends.limit
    slopes = ends.slope.dropna()
    ours = (
        f"a is {spread(shares, '.2f')} of 2/η at a loss of {ends.loss.mean():.1e}; it goes as the"
        f" loss to the power {spread(slopes, '.2f') if len(slopes) else 'not known'}"
    )
    if loss == "squared":
        return all_of(
            "with the squared loss the sharpness does not vanish with the loss",
            (shares >= 0.5) & (shares <= 1.05),
            theory=f"rises to 2/η = {bound:g}",
            ours=ours,
            tolerance="half of 2/η to 5 % above it",
            why="progressive sharpening goes on as long as the loss falls",
        )
    fallen = ends.sharpness / ends.highest
    return all_of(
        "with cross-entropy the sharpness vanishes with the loss",
        [fallen.max() < 0.1, len(slopes) > 0, (slopes > 0.5).all()],
        theory="a → 0",
        ours=f"{ours}; {spread(fallen, '.1%')} of its highest",
        tolerance="less than a tenth of its highest; power above 0.5",
        why="the curvature of cross-entropy in the outputs is at most 2(1 − p), p the probability"
        " given to the right class",
    )


def _draw_course(its: Any) -> Figure:
    figure, (axes,) = panels(width=5.5)
    lr, first = its.lr.iloc[0], its.seed.iloc[0]
    for (loss, seed), each in its.groupby(["trained_by", "seed"], sort=False):
        label = loss if seed == first else ""
        style = {"marker": "o", "markersize": 3, "linewidth": 1}
        trace(axes, each.loss, each.sharpness, label, COLOURS[loss], **style)
    limit(axes, y=2 / lr, label=f"2/η, η = {lr:g}")
    finish(axes, "training loss", "sharpness a", log="xy")
    axes.invert_xaxis()
    return figure


EXPERIMENT = LossShape
