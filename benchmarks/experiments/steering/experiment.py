"""Steering from a sharp minimum to named regions of the diagram, against baselines; and from scratch.

Gradient descent trains to a sharp minimum. From there the controller is given a
region: flatter, more uniform, both, or sharper. What it reaches is compared with a fixed learning
rate and batch size, a grid-searched schedule, a rate by curvature (CDAT) and a batch size by the
noise scale. The region is the only setting of steering.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from benchmarks.experiments.steering.job import Steered
from benchmarks.experiments.steering.methods import REGIONS, Budget
from benchmarks.framework.claims import Claim, all_of, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import GREEN, GREY, VERMILION, finish, limit, panels, trace
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from stableopt import StabilityMargins, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Steering"]

IN_THE_PLANE = ("more uniform", "both")
"""Regions that bound the non-uniformity: the path to them is drawn in the diagram."""

WITHIN = 0.1
"""Relative distance to the target that counts as there."""

BACK = 1e-3
"""Training loss that counts as trained."""


@dataclass(frozen=True)
class Steering(Experiment, Budget):
    """Regions and rivals.

    Attributes:
        n: training images.
        random_labels: how many of them get a random label.

    The others are those of :class:`~benchmarks.experiments.steering.methods.Budget`.
    """

    name = "steering"
    shows = "Beyond the paper"
    columns: ClassVar = {
        "summary": (
            *("to", "by", "sharpness", "least_to_target", "most_to_target"),
            *("non_uniformity", "trained", "diverged", "test_accuracy"),
        ),
        **dict.fromkeys(("runs", "paths", "diagram-more-uniform", "diagram-both"), ()),
    }
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 60, "start_loss": 0.06, "steps": 20, "sgd_steps": 20, "batch_size": 16},
            **{"measure_every": 4, "grid_lrs": (1.5, 2.0), "grid_ramps": (1,)},
            **{"scratch_steps": 20, "scratch_lrs": (0.1,)},
        },
        ("small", "digits"): {
            **{"seeds": (0, 1), "sgd_steps": 2000, "grid_lrs": (1.5, 2.0, 4.0)},
            **{"grid_ramps": (1,), "scratch_lrs": (0.1, 0.5)},
        },
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4)},
    }

    n: int = 200
    random_labels: int = 0

    def cases(self) -> dict[str, list[Case]]:
        """Return all runs from each seed's minimum, in two tables."""
        data = Dataset(self.data, self.n, self.random_labels)
        budget = Budget(**{field.name: getattr(self, field.name) for field in fields(Budget)})
        cases = [case(Steered(data, seed, budget), "seed") for seed in self.seeds]
        return {"runs": cases, "paths": cases}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return where each run ended, or each measurement of the steered ones."""
        if name == "runs":
            return found["runs"]
        targets = {row["region"]: row for row in found["runs"] if row["method"] == "steered"}
        keys = ("least_sharpness", "target_sharpness", "aim")
        keys += ("least_non_uniformity", "target_non_uniformity")
        return [
            {"region": region, **one.keys, **row} | {key: targets[region][key] for key in keys}
            for region, its in found["paths"].items()
            for row in its
        ]

    def derived(self, tables: Tables) -> Tables:
        """Return the summary of the runs, and the paths to regions in the plane."""
        found = {"summary": summary(tables["runs"])} if "runs" in tables else {}
        paths = tables.get("paths", pd.DataFrame({"region": []}))
        its = {name: paths[paths.region == name] for name in IN_THE_PLANE}
        diagrams = {f"diagram-{name.replace(' ', '-')}": each for name, each in its.items()}
        return {**found, **{name: each for name, each in diagrams.items() if len(each)}}

    def draw(self, name: str, its: pd.DataFrame) -> Figure | None:
        """Return the paths of the first seed."""
        if name not in ("paths", "diagram-more-uniform", "diagram-both"):
            return None
        first = its[its.seed == its.seed.iloc[0]]
        return _draw_sharpness(first) if name == "paths" else _draw_diagram(first)

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return which regions were reached, and that a fixed rate reaches none of them."""
        if "runs" not in tables:
            return
        runs = tables["runs"]
        for region in (*REGIONS, "from scratch"):
            its = runs[(runs.method == "steered") & (runs.region == region)]
            if len(its):
                yield _reached(region, its)
        fixed = runs[(runs.method == "fixed") & runs.sharpness.notna()]
        if len(fixed):
            start = runs[runs.method == "GD"].set_index("seed").sharpness
            moved = fixed.sharpness / fixed.seed.map(start)
            yield all_of(
                "at a fixed learning rate gradient descent stays as sharp as it is",
                (moved - 1).abs() <= WITHIN,
                theory="sharpness / that of the minimum 1",
                ours=spread(moved),
                tolerance=f"{WITHIN:.0%}, every seed",
            )


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and region, over its seeds."""
    groups = runs.groupby(["region", "method"], sort=False)
    return table({"to": to, "by": by, **_common(its)} for (to, by), its in groups)


def _common(its: Any) -> Row:
    alive = its[its.failed == 0]
    known = {name: alive[name].dropna().tolist() for name in alive}
    ratios, uniform = known["sharpness_to_target"], _uniform(alive)
    return {
        "seeds": len(its),
        "sharpness": mean(known["sharpness"]) if known["sharpness"] else None,
        "least_to_target": min(ratios, default=None),
        "most_to_target": max(ratios, default=None),
        "non_uniformity": mean(known["non_uniformity"]) if known["non_uniformity"] else None,
        "uniform_enough": sum(uniform) if uniform else None,
        "trained": int((alive.loss < BACK).sum()),
        "diverged": len(its) - len(alive),
        "test_accuracy": mean(its.test_accuracy.tolist()),
        "largest_loss": max(known["largest_loss"], default=None),
        "steps": mean(its.steps.tolist()),
        "products": mean(its.products.tolist()),
    }


def _uniform(its: Any) -> list[bool]:
    """Return whether runs with a bound on the non-uniformity keep it."""
    bounded = its.dropna(subset=["non_uniformity", "target_non_uniformity"])
    return (bounded.non_uniformity <= bounded.target_non_uniformity).tolist()


def _reached(region: str, its: Any) -> Claim:
    alive = its[its.failed == 0]
    lost, trained = len(its) - len(alive), (alive.loss < BACK).sum()
    ratios, uniform, parts = alive.sharpness_to_target.dropna(), _uniform(alive), []
    if len(ratios):
        near = ((ratios - 1).abs() <= WITHIN).sum()
        within = f"within {WITHIN:.0%} of it in {near} of {len(its)}"
        parts.append(f"sharpness / bound {spread(ratios)}, {within}")
    if uniform:
        parts.append(f"s within the target in {sum(uniform)} of {len(uniform)}")
    bounded_above = its.target_sharpness.notna().any()
    inside = ratios <= 1 + WITHIN if bounded_above else ratios >= 1 - WITHIN
    held = [*inside, *uniform, *[False] * lost]
    said = [] if all(held) else its.said.dropna().tolist()[:1]
    why = [f"{lost} diverged"] * bool(lost) + [f"the controller said: {text}" for text in said]
    return all_of(
        f"steered, {region}",
        held,
        theory="ends in the region",
        ours="; ".join([*parts, f"loss below {BACK:g} in {trained} of {len(its)}"]),
        tolerance=f"{WITHIN:.0%} beyond the bound on the sharpness, every seed",
        why="; ".join(why),
    )


def _draw_sharpness(paths: pd.DataFrame) -> Figure:
    """Return sharpness, its limit and the loss on the way to each region."""
    names = list(dict.fromkeys(paths.region))
    figure, axes = panels(len(names), rows=2, width=3.2, height=2.7, sharex="col")
    for number, name in enumerate(names):
        top, bottom = axes[number], axes[number + len(names)]
        its = paths[paths.region == name]
        trace(top, its.step, its.sharpness, "sharpness a")
        limit(top, its.step, its.sharpness_limit, "2/η", VERMILION)
        trace(top, its.step, its.aim, "target", GREEN, linestyle=":")
        trace(bottom, its.step, its.loss, colour=GREY)
        finish(top, y="" if number else "sharpness a", title=name, legend=not number)
        finish(bottom, "step", "" if number else "training loss", log="y")
    return figure


def _draw_diagram(its: pd.DataFrame) -> Figure:
    """Return the path to a region in the plane of sharpness and non-uniformity."""
    first = its.iloc[0]
    low = first[["least_sharpness", "least_non_uniformity"]].fillna(0.0)
    high = first[["target_sharpness", "target_non_uniformity"]].fillna(float("inf"))
    path = [
        StabilityMargins(step=step, sharpness=a, non_uniformity=s)
        for step, a, s in zip(its.step, its.sharpness, its.non_uniformity, strict=True)
    ]
    marked = its.dropna(subset="mark")
    return plot.diagram(
        None,
        path,
        target=tuple(zip(low, high, strict=True)),
        marks=list(zip(marked.step, marked.mark, strict=True)),
        title=f"steered: {first.region}",
    )


EXPERIMENT = Steering
