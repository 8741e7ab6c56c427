"""Where SGD is stable in the plane of sharpness and non-uniformity: Figure 3 of the paper.

One-dimensional quadratic problems on a grid of sharpness a and non-uniformity s, their samples'
curvatures a ± s: does the mean of x² grow under SGD? Exactly, by E x² ← [(1 − ηa)² + η²ps²] E x²,
and by simulation of a few steps of many runs; few, because the mean of a product of random factors
rests on ever rarer runs, and a simulation of many steps takes unstable points for stable ones. The
paper's box (9) is drawn with the half-ellipse where the growth is 1, which it encloses. A family of
problems in two dimensions, without common eigenvectors, shows that there the box is neither necessary
nor sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.experiments.diagram.jobs import Family, Plane
from benchmarks.framework.claims import Claim, all_of
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    finish,
    limit,
    panels,
    points,
    trace,
)
from benchmarks.framework.tables import Row
from benchmarks.runner import Store
from stableopt.stability import StabilityRegion, UpdateRule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Diagram"]

UNDECIDED = 0.1
"""Growth within this distance of 1, which a simulation of a few thousand runs cannot tell from 1."""


@dataclass(frozen=True)
class Diagram(Experiment):
    """Figure 3.

    Attributes:
        lr: learning rate.
        batch_sizes: B.
        n: samples of a one-dimensional problem.
        points: of the grid in each direction.
        runs: of SGD at each point, for each seed.
        steps: of each run.
        widths: how many values of w, from 0 to 2, in two dimensions.
    """

    name = "diagram"
    shows = "Figure 3"
    datasets = ("quadratic",)
    columns: ClassVar = {"plane": ()}  # a picture
    presets: ClassVar = {
        ("smoke", ""): {"points": 10, "runs": 1000, "widths": 9},
        ("paper", ""): {"points": 48, "runs": 20_000, "seeds": (0, 1, 2), "widths": 81},
    }

    data: str = "quadratic"
    lr: float = 0.1
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    n: int = 100
    points: int = 24
    runs: int = 5000
    steps: int = 5
    widths: int = 41

    def cases(self) -> dict[str, list[Case]]:
        """Return a plane for each batch size and seed, and the family."""
        planes = [
            Plane(self.lr, size, self.n, self.points, self.runs, self.steps, seed)
            for size in self.batch_sizes
            for seed in self.seeds
        ]
        family = Family(tuple(np.linspace(0, 2, self.widths).round(6).tolist()))
        keys = ("batch_size", "n", "lr", "seed")
        return {"plane": [case(job, *keys) for job in planes], "two-dimensions": [case(family)]}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return the cells of the plane, or the widths of the family."""
        return ({**one.keys, **cell} for cell in found["cells"])

    def draw(self, name: str, its: pd.DataFrame) -> Figure:
        """Return the planes, or the largest learning rates of the family."""
        if name == "two-dimensions":
            figure, (axes,) = panels(width=5.5)
            _draw_family(axes, its)
            return figure
        its = its[its.seed == its.seed.iloc[0]]
        sizes = list(dict.fromkeys(its.batch_size))
        figure, axes = panels(len(sizes), width=4)
        for panel, size in zip(axes, sizes, strict=True):
            _draw_plane(panel, its[its.batch_size == size])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return what (9) says in one dimension, and what becomes of it in two."""
        if "plane" in tables:
            yield from _in_one_dimension(tables["plane"])
        if "two-dimensions" in tables:
            yield from _in_two_dimensions(tables["two-dimensions"])


def _in_one_dimension(its: Any) -> Iterator[Claim]:
    inside, outside = its[its.in_box.astype(bool)], its[~its.in_box.astype(bool)]
    seen = int((outside.simulated <= 1).sum())
    yield all_of(
        "no point outside the box (9) is stable, in one dimension",
        outside.growth > 1,
        printed="(9) is necessary",
        ours=f"{(outside.growth <= 1).sum()} of {len(outside):,} points by the exact recursion,"
        f" {seen} by simulation",
        tolerance="none by the recursion",
        why="a simulation can miss the rare runs that carry the mean" if seen else "",
    )
    cells, unstable = 1 - math.pi / 4, (inside.growth > 1).mean()
    yield all_of(
        "part of the box that is unstable all the same",
        [abs(unstable - cells) <= 0.02],
        theory=f"box less half-ellipse: 1 − π/4 = {cells:.1%}",
        ours=f"{unstable:.1%} of {len(inside):,} points",
        tolerance="2 percentage points, of a coarse grid",
        why="the paper draws the box alone",
    )
    clear = its[(its.growth - 1).abs() > UNDECIDED]
    agree = (clear.growth > 1) == (clear.simulated > 1)
    yield all_of(
        "the half-ellipse (1 − ηa)² + η²ps² = 1 separates stable from unstable",
        agree,
        theory="exactly",
        ours=f"simulation agrees at {agree.sum():,} of {len(clear):,} points",
        tolerance=f"all whose growth is not within {UNDECIDED:g} of 1",
        why=f"{len(its) - len(clear)} points are nearer",
    )


def _in_two_dimensions(its: Any) -> Iterator[Claim]:
    for what, printed, wrong, why in (
        (
            "in two dimensions the box (9) is not sufficient",
            "a necessary condition",
            its[its.radius_at_box > 1 + 1e-9],
            "",
        ),
        (
            "nor, beyond the paper, is it necessary",
            "a necessary condition (of (8), which is sufficient only)",
            its[its.radius_at_box < 1 - 1e-9],
            "a and s are of different directions",
        ),
    ):
        ours = "nowhere"
        if len(wrong):
            worst = wrong.loc[np.log(wrong.box / wrong.exact).abs().idxmax()]
            ours = (
                f"{len(wrong)} of the widths; most at w = {worst.w:g}: the box allows η up to"
                f" {worst.box:.4f}, stable is up to {worst.exact:.4f}"
            )
        held = [len(wrong) > 0]
        yield all_of(what, held, printed=printed, ours=ours, tolerance="one", why=why)
    held = its.theorem1 <= its.exact * (1 + 1e-6)
    yield all_of(
        "condition (8) is sufficient",
        held,
        printed="Theorem 1",
        ours=f"its largest η is above the exact one at {(~held).sum()} of {len(its)} widths",
        tolerance="none",
    )


def _draw_plane(axes: Axes, its: Any) -> None:
    lr, size, n = its.lr.iloc[0], int(its.batch_size.iloc[0]), int(its.n.iloc[0])
    region = StabilityRegion(UpdateRule(lr=lr), size, n)
    style = {"marker": "s", "markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    for group, colour, label in (
        (its[its.simulated <= 1], BLUE, "stays"),
        (its[its.simulated > 1], VERMILION, "grows"),
    ):
        points(axes, group.a, group.s, f"simulated: {label}", colour, **style)
    a, s = region.max_sharpness, region.max_non_uniformity
    limit(axes, [0, a, a], [s, s, 0], "box (9)")
    angle = np.linspace(0, math.pi, 200)
    ellipse = a / 2 * (1 - np.cos(angle)), s * np.sin(angle)
    trace(axes, *ellipse, "exact: half-ellipse", GREY)
    title = f"B = {size}, η = {lr:g}"
    finish(axes, "sharpness a", "non-uniformity s", title=title, legend=False)
    axes.grid(False)  # it would hide the points


def _draw_family(axes: Axes, its: Any) -> None:
    trace(axes, its.w, its.exact, "exact: η*", GREY, linewidth=2)
    limit(axes, its.w, its.box, "box (9)")
    trace(axes, its.w, its.theorem1, "Theorem 1 (8)", linestyle=":")
    for where, colour, label in (
        (its.box > its.exact, VERMILION, "in the box, unstable"),
        (its.box < its.exact, GREEN, "out of the box, stable"),
    ):
        style = {"color": colour, "alpha": 0.4, "label": label}
        axes.fill_between(its.w, its.box, its.exact, where=where, **style)
    finish(axes, "w", "largest learning rate", title="J = (1, w), (1, −w), (1, 0); B = 1")


EXPERIMENT = Diagram
