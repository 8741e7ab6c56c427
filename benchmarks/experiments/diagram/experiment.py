"""Where SGD is stable in the plane of sharpness and non-uniformity: Figure 3 of the paper.

Does E x² grow under SGD on one-dimensional quadratic problems whose samples have curvatures a ± s? On
a grid of a and s this is computed exactly, by E x² ← [(1 − ηa)² + η²ps²] E x², and simulated by many
runs of a few steps. More steps would miss instability, since rare runs come to carry the mean. The
paper's box (9) is drawn around the half-ellipse on which the growth is 1. A family of problems in two
dimensions, without common eigenvectors, shows that there the box is neither necessary nor sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.experiments.diagram.jobs import Family, Plane
from benchmarks.framework.claims import Claim, all_of
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
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
"""Distance of the growth from 1 that a simulation of a few thousand runs cannot resolve."""


@dataclass(frozen=True)
class Diagram(Experiment):
    """Figure 3.

    Attributes:
        lr: learning rate.
        batch_sizes: values of B.
        n: number of samples of a one-dimensional problem.
        points: grid points per direction.
        runs: runs of SGD per grid point and seed.
        steps: steps of a run.
        widths: number of values of w, from 0 to 2, in two dimensions.
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
        return {
            "plane": [case_of(job, *keys) for job in planes],
            "two-dimensions": [case_of(family)],
        }

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return the cells of the plane, or the widths of the family."""
        return ({**case.keys, **cell} for cell in result["cells"])

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return the planes, or the largest learning rates of the family."""
        if name == "two-dimensions":
            figure, (axes,) = panels(width=5.5)
            _draw_family(axes, frame)
            return figure
        frame = frame[frame.seed == frame.seed.iloc[0]]
        sizes = list(dict.fromkeys(frame.batch_size))
        figure, axes = panels(len(sizes), width=4)
        for panel, size in zip(axes, sizes, strict=True):
            _draw_plane(panel, frame[frame.batch_size == size])
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the claims on the box (9) in one dimension and in two."""
        if "plane" in tables:
            yield from _in_one_dimension(tables["plane"])
        if "two-dimensions" in tables:
            yield from _in_two_dimensions(tables["two-dimensions"])


def _in_one_dimension(plane: Any) -> Iterator[Claim]:
    inside, outside = plane[plane.in_box.astype(bool)], plane[~plane.in_box.astype(bool)]
    stable_in_simulation = int((outside.simulated <= 1).sum())
    yield all_of(
        "no point outside the box (9) is stable, in one dimension",
        outside.growth > 1,
        printed="(9) is necessary",
        ours=f"{(outside.growth <= 1).sum()} of {len(outside):,} points by the exact recursion,"
        f" {stable_in_simulation} by simulation",
        tolerance="none by the recursion",
        why="a simulation can miss the rare runs that carry the mean"
        if stable_in_simulation
        else "",
    )
    expected, unstable = 1 - math.pi / 4, (inside.growth > 1).mean()
    yield all_of(
        "part of the box that is unstable all the same",
        [abs(unstable - expected) <= 0.02],
        theory=f"box less half-ellipse: 1 − π/4 = {expected:.1%}",
        ours=f"{unstable:.1%} of {len(inside):,} points",
        tolerance="2 percentage points, of a coarse grid",
        why="the paper draws the box alone",
    )
    clear = plane[(plane.growth - 1).abs() > UNDECIDED]
    agree = (clear.growth > 1) == (clear.simulated > 1)
    yield all_of(
        "the half-ellipse (1 − ηa)² + η²ps² = 1 separates stable from unstable",
        agree,
        theory="exactly",
        ours=f"simulation agrees at {agree.sum():,} of {len(clear):,} points",
        tolerance=f"all whose growth is not within {UNDECIDED:g} of 1",
        why=f"{len(plane) - len(clear)} points are nearer",
    )


def _in_two_dimensions(family: Any) -> Iterator[Claim]:
    for statement, printed, counterexamples, why in (
        (
            "in two dimensions the box (9) is not sufficient",
            "a necessary condition",
            family[family.radius_at_box > 1 + 1e-9],
            "",
        ),
        (
            "nor, beyond the paper, is it necessary",
            "a necessary condition (of (8), which is sufficient only)",
            family[family.radius_at_box < 1 - 1e-9],
            "a and s are of different directions",
        ),
    ):
        ours = "nowhere"
        if len(counterexamples):
            distance = np.log(counterexamples.box / counterexamples.exact).abs()
            worst = counterexamples.loc[distance.idxmax()]
            ours = (
                f"{len(counterexamples)} of the widths; most at w = {worst.w:g}: the box allows η up to"
                f" {worst.box:.4f}, stable is up to {worst.exact:.4f}"
            )
        held = [len(counterexamples) > 0]
        yield all_of(statement, held, printed=printed, ours=ours, tolerance="one", why=why)
    held = family.theorem1 <= family.exact * (1 + 1e-6)
    yield all_of(
        "condition (8) is sufficient",
        held,
        printed="Theorem 1",
        ours=f"its largest η is above the exact one at {(~held).sum()} of {len(family)} widths",
        tolerance="none",
    )


def _draw_plane(axes: Axes, plane: Any) -> None:
    lr, size, n = plane.lr.iloc[0], int(plane.batch_size.iloc[0]), int(plane.n.iloc[0])
    region = StabilityRegion(UpdateRule(lr=lr), size, n)
    style = {"marker": "s", "markersize": 4, "alpha": 0.6, "markeredgewidth": 0}
    for cells, colour, label in (
        (plane[plane.simulated <= 1], BLUE, "stays"),
        (plane[plane.simulated > 1], VERMILION, "grows"),
    ):
        points(axes, cells.a, cells.s, f"simulated: {label}", colour, **style)
    a, s = region.max_sharpness, region.max_non_uniformity
    limit(axes, [0, a, a], [s, s, 0], "box (9)")
    angle = np.linspace(0, math.pi, 200)
    ellipse = a / 2 * (1 - np.cos(angle)), s * np.sin(angle)
    trace(axes, *ellipse, "exact: half-ellipse", GREY)
    title = f"B = {size}, η = {lr:g}"
    finish(axes, "sharpness a", "non-uniformity s", title=title, legend=False)
    axes.grid(False)  # it would hide the points


def _draw_family(axes: Axes, family: Any) -> None:
    trace(axes, family.w, family.exact, "exact: η*", GREY, linewidth=2)
    limit(axes, family.w, family.box, "box (9)")
    trace(axes, family.w, family.theorem1, "Theorem 1 (8)", linestyle=":")
    for region, colour, label in (
        (family.box > family.exact, VERMILION, "in the box, unstable"),
        (family.box < family.exact, GREEN, "out of the box, stable"),
    ):
        style = {"color": colour, "alpha": 0.4, "label": label}
        axes.fill_between(family.w, family.box, family.exact, where=region, **style)
    finish(axes, "w", "largest learning rate", title="J = (1, w), (1, −w), (1, 0); B = 1")


EXPERIMENT = Diagram
