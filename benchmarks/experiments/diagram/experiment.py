"""Where SGD is stable in the plane of sharpness and non-uniformity: Figure 3 of the paper.

One-dimensional quadratic problems on a grid of sharpness a and non-uniformity s, their samples'
curvatures a ± s: does the mean of x² grow under SGD? Exactly, by E x² ← [(1 − ηa)² + η²ps²] E x²,
and by simulation of a few steps of many runs; few, because the mean of a product of random factors
rests on ever rarer runs, and a simulation of many steps takes unstable points for stable ones. The
paper's box (9) is drawn beside the half-ellipse where the growth is 1, which it encloses. A family of
problems in two dimensions, without common eigenvectors, shows that there the box is neither necessary
nor sufficient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from benchmarks.experiments.diagram.jobs import Family, Plane
from benchmarks.framework.experiment import Claim, RowExperiment, Rows
from benchmarks.runner import Job, Store
from stableopt.stability import StabilityRegion, UpdateRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Diagram"]

UNDECIDED = 0.1
"""Growth this near to 1 is not told from it by a simulation of a few thousand runs."""

VERMILION, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#555555"


@dataclass(frozen=True)
class Diagram(RowExperiment):
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

    def _planes(self) -> list[Plane]:
        return [
            Plane(self.lr, size, self.n, self.points, self.runs, self.steps, seed)
            for size in self.batch_sizes
            for seed in self.seeds
        ]

    def _family(self) -> Family:
        return Family(tuple(np.linspace(0, 2, self.widths).round(6).tolist()))

    def jobs(self) -> list[Job]:
        """Return a plane for each batch size and seed, and the family."""
        return [*self._planes(), self._family()]

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``plane`` and ``two-dimensions``."""
        plane = [
            {"batch_size": job.batch_size, "n": job.n, "lr": job.lr, "seed": job.seed, **cell}
            for job in filter(store.done, self._planes())
            for cell in store.result(job)["cells"]
        ]
        family = self._family()
        widths = store.result(family)["cells"] if store.done(family) else []
        return {"plane": plane, "two-dimensions": widths}

    def row_summary(self, tables: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return the family; the plane is a picture."""
        return {"two-dimensions": tables["two-dimensions"]}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return the planes, or the largest learning rates of the family."""
        from matplotlib.figure import Figure

        if name == "two-dimensions":
            figure = Figure(figsize=(5.5, 4), layout="constrained")
            _draw_family(figure.subplots(), rows)
            return figure
        sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
        figure = Figure(figsize=(4 * len(sizes), 4), layout="constrained")
        first = rows[0]["seed"]
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            its = [row for row in rows if (row["batch_size"], row["seed"]) == (size, first)]
            _draw_plane(axes, its)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return figure

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return what (9) says in one dimension, and what becomes of it in two."""
        claims = []
        if tables.get("plane"):
            claims += _in_one_dimension(tables["plane"])
        if tables.get("two-dimensions"):
            claims += _in_two_dimensions(tables["two-dimensions"])
        return claims


def _in_one_dimension(rows: Rows) -> list[Claim]:
    outside = [row for row in rows if not row["in_box"]]
    inside = [row for row in rows if row["in_box"]]
    stable_outside = sum(row["growth"] <= 1 for row in outside)
    seen_outside = sum(row["simulated"] <= 1 for row in outside)
    unstable = sum(row["growth"] > 1 for row in inside)
    cells = 1 - math.pi / 4
    clear = [row for row in rows if abs(row["growth"] - 1) > UNDECIDED]
    agree = sum((row["growth"] > 1) == (row["simulated"] > 1) for row in clear)
    return [
        Claim(
            what="no point outside the box (9) is stable, in one dimension",
            printed="(9) is necessary",
            ours=f"{stable_outside} of {len(outside):,} points by the exact recursion,"
            f" {seen_outside} by simulation",
            tolerance="none by the recursion",
            reproduced=stable_outside == 0,
            why="a simulation can miss the rare runs that carry the mean" if seen_outside else "",
        ),
        Claim(
            what="part of the box that is unstable all the same",
            printed=f"box less half-ellipse: 1 − π/4 = {cells:.1%}",
            ours=f"{unstable / len(inside):.1%} of {len(inside):,} points",
            tolerance="2 percentage points, of a coarse grid",
            reproduced=abs(unstable / len(inside) - cells) <= 0.02,
            why="the paper draws the box alone",
        ),
        Claim(
            what="the half-ellipse (1 − ηa)² + η²ps² = 1 separates stable from unstable",
            printed="exactly",
            ours=f"simulation agrees at {agree:,} of {len(clear):,} points",
            tolerance=f"all whose growth is not within {UNDECIDED:g} of 1",
            reproduced=agree == len(clear),
            why=f"{len(rows) - len(clear)} points are nearer",
        ),
    ]


def _in_two_dimensions(rows: Rows) -> list[Claim]:
    permitted = [row for row in rows if row["radius_at_box"] > 1 + 1e-9]
    excluded = [row for row in rows if row["radius_at_box"] < 1 - 1e-9]

    def told(rows: Rows) -> str:
        if not rows:
            return "nowhere"
        worst = max(rows, key=lambda row: abs(math.log(row["box"] / row["exact"])))
        return (
            f"{len(rows)} of the widths; most at w = {worst['w']:g}: the box allows η up to"
            f" {worst['box']:.4f}, stable is up to {worst['exact']:.4f}"
        )

    wrong = [r for r in rows if not r["theorem1"] <= r["exact"] * (1 + 1e-6)]
    return [
        Claim(
            what="in two dimensions the box (9) is not sufficient",
            printed="a necessary condition",
            ours=told(permitted),
            tolerance="one",
            reproduced=bool(permitted),
        ),
        Claim(
            what="nor, beyond the paper, is it necessary",
            printed="a necessary condition (of (8), which is sufficient only)",
            ours=told(excluded),
            tolerance="one",
            reproduced=bool(excluded),
            why="a and s are of different directions",
        ),
        Claim(
            what="condition (8) is sufficient",
            printed="Theorem 1",
            ours=f"its largest η is above the exact one at {len(wrong)} of {len(rows)} widths",
            tolerance="none",
            reproduced=not wrong,
        ),
    ]


def _draw_plane(axes: Axes, rows: Rows) -> None:
    first = rows[0]
    region = StabilityRegion(UpdateRule(lr=first["lr"]), first["batch_size"], first["n"])
    for stable, colour, label in ((True, BLUE, "stays"), (False, VERMILION, "grows")):
        its = [row for row in rows if (row["simulated"] <= 1) == stable]
        axes.scatter(
            [row["a"] for row in its],
            [row["s"] for row in its],
            s=9,
            marker="s",
            color=colour,
            alpha=0.5,
            linewidths=0,
            label=f"simulated: {label}",
        )
    a, s = region.max_sharpness, region.max_non_uniformity
    axes.plot([0, a, a], [s, s, 0], color="black", linestyle="--", linewidth=1.2, label="box (9)")
    angle = np.linspace(0, math.pi, 200)
    axes.plot(
        a / 2 * (1 - np.cos(angle)), s * np.sin(angle), color=GREY, label="exact: half-ellipse"
    )
    axes.set(
        xlabel="sharpness a",
        ylabel="non-uniformity s",
        title=f"B = {first['batch_size']}, η = {first['lr']:g}",
    )


def _draw_family(axes: Axes, rows: Rows) -> None:
    w = [row["w"] for row in rows]
    exact = np.array([row["exact"] for row in rows])
    box = np.array([row["box"] for row in rows])
    axes.plot(w, exact, color=GREY, linewidth=2, label="exact: η*")
    axes.plot(w, box, color="black", linestyle="--", linewidth=1.2, label="box (9)")
    axes.plot(w, [row["theorem1"] for row in rows], ":", color=BLUE, label="Theorem 1 (8)")
    for where, colour, label in (
        (box > exact, VERMILION, "in the box, unstable"),
        (box < exact, GREEN, "out of the box, stable"),
    ):
        axes.fill_between(w, box, exact, where=where, color=colour, alpha=0.4, label=label)
    axes.set(xlabel="w", ylabel="largest learning rate", title="J = (1, w), (1, −w), (1, 0); B = 1")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")


EXPERIMENT = Diagram
