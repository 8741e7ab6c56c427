"""Steering from a sharp minimum to named regions of the diagram, against baselines; and from scratch.

Gradient descent trains to a sharp minimum. From there the controller steers to a region: flatter, more
uniform, both, or sharper. The baselines are a fixed learning rate and batch size, a grid-searched
schedule, a learning rate set by curvature (CDAT), and a batch size set by the noise scale. The region is
the only setting of the controller.
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
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
from benchmarks.framework.plotting import GREEN, GREY, VERMILION, finish, limit, panels, trace
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from stableopt import StabilityMargins, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Steering"]

IN_THE_PLANE = ("more uniform", "both")
"""Regions that bound the non-uniformity; paths to them are drawn in the stability diagram."""

WITHIN = 0.1
"""Largest relative distance to the target that counts as reaching it."""

TRAINED_LOSS = 1e-3
"""Training loss below which a run counts as trained."""


@dataclass(frozen=True)
class Steering(Experiment, Budget):
    """Steering to regions, and baselines.

    Attributes:
        n: number of training images.
        random_labels: how many of them get a random label.

    The other attributes are those of :class:`~benchmarks.experiments.steering.methods.Budget`.
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
            **{"n": 30, "start_loss": 0.06, "steps": 8, "sgd_steps": 8, "batch_size": 16},
            **{"measure_every": 4, "grid_lrs": (1.5, 2.0), "grid_ramps": (1,)},
            **{"scratch_steps": 8, "scratch_lrs": (0.1,)},
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
        """Return a job with all runs for each seed, in two tables."""
        data = Dataset(self.data, self.n, self.random_labels)
        budget = Budget(**{field.name: getattr(self, field.name) for field in fields(Budget)})
        cases = [case_of(Steered(data, seed, budget), "seed") for seed in self.seeds]
        return {"runs": cases, "paths": cases}

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return the end of each run, or the measurements of the steered runs."""
        if name == "runs":
            return result["runs"]
        targets = {row["region"]: row for row in result["runs"] if row["method"] == "steered"}
        keys = ("least_sharpness", "target_sharpness", "aim")
        keys += ("least_non_uniformity", "target_non_uniformity")
        return [
            {"region": region, **case.keys, **row} | {key: targets[region][key] for key in keys}
            for region, path in result["paths"].items()
            for row in path
        ]

    def derived(self, tables: Tables) -> Tables:
        """Return the summary of the runs, and the paths drawn in the stability diagram."""
        derived = {}
        if "runs" in tables:
            derived["summary"] = summary(tables["runs"])
        if "paths" in tables:
            for region in IN_THE_PLANE:
                path = tables["paths"][tables["paths"].region == region]
                if len(path):
                    derived[f"diagram-{region.replace(' ', '-')}"] = path
        return derived

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return the paths of the first seed."""
        if name not in ("paths", "diagram-more-uniform", "diagram-both"):
            return None
        first_seed = frame[frame.seed == frame.seed.iloc[0]]
        return _draw_sharpness(first_seed) if name == "paths" else _draw_diagram(first_seed)

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield which regions were reached, and that a fixed learning rate changes nothing."""
        if "runs" not in tables:
            return
        runs = tables["runs"]
        for region in (*REGIONS, "from scratch"):
            steered = runs[(runs.method == "steered") & (runs.region == region)]
            if len(steered):
                yield _reached(region, steered)
        fixed = runs[(runs.method == "fixed") & runs.sharpness.notna()]
        if len(fixed):
            start = runs[runs.method == "GD"].set_index("seed").sharpness
            ratios = fixed.sharpness / fixed.seed.map(start)
            yield all_of(
                "at a fixed learning rate gradient descent stays as sharp as it is",
                (ratios - 1).abs() <= WITHIN,
                theory="sharpness / that of the minimum 1",
                ours=spread(ratios),
                tolerance=f"{WITHIN:.0%}, every seed",
            )


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each method and region, aggregated over seeds."""
    groups = runs.groupby(["region", "method"], sort=False)
    return table({"to": to, "by": by, **_aggregate(group)} for (to, by), group in groups)


def _aggregate(runs: Any) -> Row:
    finite = runs[runs.failed == 0]
    values = {name: finite[name].dropna().tolist() for name in finite}
    ratios, uniform_enough = values["sharpness_to_target"], _uniform_enough(finite)
    return {
        "seeds": len(runs),
        "sharpness": mean(values["sharpness"]) if values["sharpness"] else None,
        "least_to_target": min(ratios, default=None),
        "most_to_target": max(ratios, default=None),
        "non_uniformity": mean(values["non_uniformity"]) if values["non_uniformity"] else None,
        "uniform_enough": sum(uniform_enough) if uniform_enough else None,
        "trained": int((finite.loss < TRAINED_LOSS).sum()),
        "diverged": len(runs) - len(finite),
        "test_accuracy": mean(runs.test_accuracy.tolist()),
        "largest_loss": max(values["largest_loss"], default=None),
        "steps": mean(runs.steps.tolist()),
        "products": mean(runs.products.tolist()),
    }


def _uniform_enough(runs: Any) -> list[bool]:
    """Return, for runs with a bound on the non-uniformity, whether they satisfy it."""
    bounded = runs.dropna(subset=["non_uniformity", "target_non_uniformity"])
    return (bounded.non_uniformity <= bounded.target_non_uniformity).tolist()


def _reached(region: str, runs: Any) -> Claim:
    finite = runs[runs.failed == 0]
    diverged, trained = len(runs) - len(finite), (finite.loss < TRAINED_LOSS).sum()
    ratios, uniform_enough = finite.sharpness_to_target.dropna(), _uniform_enough(finite)
    parts = []
    if len(ratios):
        near = ((ratios - 1).abs() <= WITHIN).sum()
        within = f"within {WITHIN:.0%} of it in {near} of {len(runs)}"
        parts.append(f"sharpness / bound {spread(ratios)}, {within}")
    if uniform_enough:
        parts.append(f"s within the target in {sum(uniform_enough)} of {len(uniform_enough)}")
    bounded_above = runs.target_sharpness.notna().any()
    inside = ratios <= 1 + WITHIN if bounded_above else ratios >= 1 - WITHIN
    held = [*inside, *uniform_enough, *[False] * diverged]
    why = [f"{diverged} diverged"] if diverged else []
    if not all(held):
        why += [f"the controller said: {text}" for text in runs.said.dropna().tolist()[:1]]
    return all_of(
        f"steered, {region}",
        held,
        theory="ends in the region",
        ours="; ".join([*parts, f"loss below {TRAINED_LOSS:g} in {trained} of {len(runs)}"]),
        tolerance=f"{WITHIN:.0%} beyond the bound on the sharpness, every seed",
        why="; ".join(why),
    )


def _draw_sharpness(paths: pd.DataFrame) -> Figure:
    """Return sharpness, its limit and the loss along the path to each region."""
    names = list(dict.fromkeys(paths.region))
    figure, axes = panels(len(names), rows=2, width=3.2, height=2.7, sharex="col")
    for index, name in enumerate(names):
        top, bottom = axes[index], axes[index + len(names)]
        path = paths[paths.region == name]
        trace(top, path.step, path.sharpness, "sharpness a")
        limit(top, path.step, path.sharpness_limit, "2/η", VERMILION)
        trace(top, path.step, path.aim, "target", GREEN, linestyle=":")
        trace(bottom, path.step, path.loss, colour=GREY)
        finish(top, y="" if index else "sharpness a", title=name, legend=not index)
        finish(bottom, "step", "" if index else "training loss", log="y")
    return figure


def _draw_diagram(path: pd.DataFrame) -> Figure:
    """Return the path to a region in the plane of sharpness and non-uniformity."""
    first = path.iloc[0]
    low = first[["least_sharpness", "least_non_uniformity"]].fillna(0.0)
    high = first[["target_sharpness", "target_non_uniformity"]].fillna(float("inf"))
    margins = [
        StabilityMargins(step=step, sharpness=a, non_uniformity=s)
        for step, a, s in zip(path.step, path.sharpness, path.non_uniformity, strict=True)
    ]
    marked = path.dropna(subset="mark")
    return plot.diagram(
        None,
        margins,
        target=tuple(zip(low, high, strict=True)),
        marks=list(zip(marked.step, marked.mark, strict=True)),
        title=f"steered: {first.region}",
    )


EXPERIMENT = Steering
