"""The loss around its minima, a quadratic or vanishing with cross-entropy: Figure 4 of the paper.

We read that figure as showing the loss around a minimum. At minima of gradient descent with the squared
loss, the loss along the Hessian's top eigenvector is compared with its quadratic approximation, which
linear stability assumes: how much does it rise before the two differ by a tenth? Then gradient descent
trains with either loss. With the squared loss the sharpness rises towards 2/η while the loss falls. With
cross-entropy the sharpness falls to zero with the loss, so that in the limit every learning rate is
stable, and linear stability selects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from benchmarks.experiments.loss_shape.jobs import LOSSES, WITHIN, Course, Line
from benchmarks.framework.claims import Claim, all_of, at_least, span, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
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
        n: number of training images.
        target_loss: training loss of the minima.
        max_steps: largest number of steps to a minimum.
        course_n: training images of the runs with either loss; ``None`` for ``n``.
        course_lr: learning rate of these runs.
        course_steps: their steps.
        looks: number of measurements during each.
    """

    name = "loss-shape"
    shows = "Figure 4, as we read it"
    columns: ClassVar = {"line": (), "course": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "lrs": (1.0,), "target_loss": 0.02},
            **{"course_steps": 50, "looks": 4},
        },
        ("small", "digits"): {"target_loss": 1e-3, "lrs": (0.5, 2.0), "course_steps": 3000},
        # With a tenth of the images cross-entropy can take the many steps in which it vanishes. At
        # this learning rate it does not diverge.
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
        """Return a line through each minimum, in two tables, and the runs with either loss."""
        data = Dataset(self.data, self.n)
        lines = [
            case_of(Line(minimum.job), lr=minimum.job.lr, seed=minimum.job.seed)
            for minimum in minima(self, data, lrs=self.lrs)
        ]
        course_data = Dataset(self.data, self.course_n or self.n)
        courses = [
            Course(course_data, loss, self.course_lr, seed, self.course_steps, self.looks)
            for loss in LOSSES
            for seed in self.seeds
        ]
        course_cases = [
            case_of(job, trained_by=job.loss, lr=job.lr, seed=job.seed) for job in courses
        ]
        return {"minima": lines, "line": lines, "course": course_cases}

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return the minimum, the points of the line, or the measurements of a run."""
        if name == "minima":
            keys = ("loss", "sharpness", "slope", "trusted_rise")
            return [case.keys | {key: result[key] for key in keys}]
        if name == "course":
            return [case.keys | record for record in result["course"]]
        points = zip(result["t"], result["losses"], result["quadratic"], strict=True)
        return [case.keys | {"t": t, "loss": loss, "quadratic": q} for t, loss, q in points]

    def summary(self, tables: Tables) -> Tables:
        """Return the minima, and the ends of the runs."""
        ends = {"course-ends": _ends(tables["course"])} if "course" in tables else {}
        return {**super().summary(tables), **ends}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return the loss and its quadratic, or sharpness against loss during training."""
        if name == "minima":
            return None
        if name == "course":
            return _draw_course(frame)
        frame = frame[frame.seed == frame.seed.iloc[0]]
        lrs = list(dict.fromkeys(frame.lr))
        figure, axes = panels(len(lrs), width=3.6, height=3.4)
        for panel, lr in zip(axes, lrs, strict=True):
            line = frame[frame.lr == lr]
            trace(panel, line.t, line.loss, "loss")
            limit(panel, line.t, line.quadratic, "quadratic")
            is_first = panel is axes[0]
            y = "squared loss" if is_first else ""
            finish(panel, "along the top eigenvector", y, title=f"η = {lr:g}", legend=is_first)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the range of the quadratic, and the trend of the sharpness with either loss."""
        if "minima" in tables:
            rises = tables["minima"].trusted_rise.fillna(np.inf)  # missing: no limit found
            yield at_least(
                "around a minimum the loss is its quadratic, along the top eigenvector",
                rises,
                1,
                printed="the assumption of linear stability",
                theory="",
                ours=f"until the loss has risen by {span(rises, '.2g')} times its value, at"
                f" {len(rises)} {'minimum' if len(rises) == 1 else 'minima'}",
                tolerance=f"{WITHIN:.0%} of the quadratic until the loss has doubled",
                why="until it has risen tenfold, which counts as an escape:"
                f" {(rises >= 9).sum()} of {len(rises)}",
            )
        if "course" in tables:
            for loss, ends in _ends(tables["course"]).groupby("trained_by", sort=False):
                yield _on_courses(str(loss), ends)


def _ends(course: Any) -> pd.DataFrame:
    """Return the end of each run, its largest sharpness, and the slope against the loss."""
    rows = []
    measured = course.dropna(subset="sharpness")
    for _, run in measured.groupby(["trained_by", "seed"], sort=False):
        end = run.iloc[-1]
        keys = ("trained_by", "seed", "step", "loss", "sharpness")
        rows.append(
            {key: end[key] for key in keys}
            | {"limit": 2 / end.lr, "highest": run.sharpness.max(), "slope": _slope(run)}
        )
    return table(rows)


def _slope(run: Any) -> float | None:
    """Return d log(sharpness)/d log(loss) over the last decade of the loss."""
    last_decade = run[run.loss <= 10 * run.loss.iloc[-1]]
    if len(last_decade) < 3:
        return None
    logs = (np.log(last_decade[key].to_numpy(float)) for key in ("loss", "sharpness"))
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


def _draw_course(courses: Any) -> Figure:
    figure, (axes,) = panels(width=5.5)
    lr, first = courses.lr.iloc[0], courses.seed.iloc[0]
    for (loss, seed), run in courses.groupby(["trained_by", "seed"], sort=False):
        label = loss if seed == first else ""
        style = {"marker": "o", "markersize": 3, "linewidth": 1}
        trace(axes, run.loss, run.sharpness, label, COLOURS[loss], **style)
    limit(axes, y=2 / lr, label=f"2/η, η = {lr:g}")
    finish(axes, "training loss", "sharpness a", log="xy")
    axes.invert_xaxis()
    return figure


EXPERIMENT = LossShape
