"""What the steering experiment shows: its summary, its pictures, and what it claims."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.experiments.steering.case import REGIONS
from benchmarks.framework.experiment import Claim, Rows, spread
from stableopt import StabilityMargins, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["claims", "draw_diagram", "draw_sharpness", "summary"]

WITHIN = 0.1
"""Relative distance to the target that counts as there."""

BACK = 1e-3
"""Training loss that counts as trained."""


def summary(rows: Rows) -> Rows:
    """Return for each method and region what its seeds have in common."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["region"], row["method"]), []).append(row)
    return [
        {"to": region, "by": method, **_common(group)} for (region, method), group in groups.items()
    ]


def _common(group: Rows) -> dict[str, Any]:
    alive = [row for row in group if not row["failed"]]
    ratios = _known(alive, "sharpness_to_target")
    uniform = _uniform(alive)
    return {
        "seeds": len(group),
        "sharpness": _mean(_known(alive, "sharpness")),
        "least_to_target": min(ratios, default=None),
        "most_to_target": max(ratios, default=None),
        "non_uniformity": _mean(_known(alive, "non_uniformity")),
        "uniform_enough": sum(uniform) if uniform else None,
        "trained": sum(row["loss"] < BACK for row in alive),
        "diverged": len(group) - len(alive),
        "test_accuracy": mean(row["test_accuracy"] for row in group),
        "largest_loss": max(_known(alive, "largest_loss"), default=None),
        "steps": mean(row["steps"] for row in group),
        "products": mean(row["products"] for row in group),
    }


def _known(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if row[key] is not None]


def _uniform(rows: Rows) -> list[bool]:
    return [
        row["non_uniformity"] <= row["target_non_uniformity"]
        for row in rows
        if row["target_non_uniformity"] is not None and row["non_uniformity"] is not None
    ]


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def draw_sharpness(rows: Rows) -> Figure:
    """Return sharpness, its limit and the loss on the way to each region, of the first seed."""
    from matplotlib.figure import Figure

    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    names = list(dict.fromkeys(row["region"] for row in first))
    figure = Figure(figsize=(3.2 * len(names), 5.4), layout="constrained")
    panels = figure.subplots(2, len(names), sharex="col", squeeze=False)
    for (top, bottom), name in zip(panels.T, names, strict=True):
        its = [row for row in first if row["region"] == name]
        steps = [row["step"] for row in its]
        top.plot(steps, _column(its, "sharpness"), color="#0072B2", label="sharpness")
        style = {"color": "#D55E00", "linestyle": "--", "linewidth": 1}
        top.plot(steps, _column(its, "sharpness_limit"), label="2/η", **style)
        if its[0]["aim"] is not None:
            top.axhline(its[0]["aim"], color="#009E73", linestyle=":", label="target")
        top.set_title(name)
        bottom.semilogy(steps, _column(its, "loss"), color="#555555")
        bottom.set_xlabel("step")
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
    panels[0, 0].legend(frameon=False, fontsize="small")
    panels[0, 0].set_ylabel("sharpness")
    panels[1, 0].set_ylabel("training loss")
    return figure


def _column(rows: Rows, key: str) -> list[float]:
    return [float("nan") if row[key] is None else row[key] for row in rows]


def draw_diagram(rows: Rows) -> Figure:
    """Return the way to a region in the plane of sharpness and non-uniformity, of the first seed."""
    its = [row for row in rows if row["seed"] == rows[0]["seed"]]
    bounds = [
        (
            0.0 if its[0][low] is None else its[0][low],
            float("inf") if its[0][high] is None else its[0][high],
        )
        for low, high in (
            ("least_sharpness", "target_sharpness"),
            ("least_non_uniformity", "target_non_uniformity"),
        )
    ]
    path = [
        StabilityMargins(
            step=row["step"],
            sharpness=row["sharpness"],
            non_uniformity=row["non_uniformity"],
        )
        for row in its
    ]
    marks = [(row["step"], str(row["mark"])) for row in its if row["mark"] is not None]
    title = f"steered: {its[0]['region']}"
    return plot.diagram(None, path, target=(bounds[0], bounds[1]), marks=marks, title=title)


def claims(rows: Rows) -> list[Claim]:
    """Return whether each region was reached, and whether those who do not know it get there."""
    found = []
    for region in REGIONS:
        its = [row for row in rows if (row["method"], row["region"]) == ("steered", region)]
        if its:
            found.append(_reached(region, its))
    scratch = [row for row in rows if (row["method"], row["region"]) == ("steered", "from scratch")]
    if scratch:
        found.append(_reached("from scratch", scratch))
    fixed = [row for row in rows if row["method"] == "fixed" and row["sharpness"] is not None]
    start = {row["seed"]: row["sharpness"] for row in rows if row["method"] == "GD"}
    if fixed:
        moved = [row["sharpness"] / start[row["seed"]] for row in fixed]
        found.append(
            Claim(
                what="at a fixed learning rate gradient descent stays as sharp as it is",
                printed="sharpness / that of the minimum 1",
                ours=spread(moved),
                tolerance=f"{WITHIN:.0%}, every seed",
                reproduced=all(abs(ratio - 1) <= WITHIN for ratio in moved),
            )
        )
    return found


def _reached(region: str, rows: Rows) -> Claim:
    alive = [row for row in rows if not row["failed"]]
    parts, good = [], len(alive) == len(rows)
    ratios = _known(alive, "sharpness_to_target")
    near = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    if ratios:
        parts.append(
            f"sharpness / bound {spread(ratios)}, within {WITHIN:.0%} of it in {near} of {len(rows)}"
        )
        below = any(row["target_sharpness"] is not None for row in rows)
        good = good and all(r <= 1 + WITHIN if below else r >= 1 - WITHIN for r in ratios)
    uniform = _uniform(alive)
    if uniform:
        parts.append(f"s within the target in {sum(uniform)} of {len(uniform)}")
        good = good and all(uniform)
    trained = sum(row["loss"] < BACK for row in alive)
    said = next((row["said"] for row in rows if row["said"]), "") if not good else ""
    lost = len(rows) - len(alive)
    return Claim(
        what=f"steered, {region}",
        printed="ends in the region",
        ours="; ".join([*parts, f"loss below {BACK:g} in {trained} of {len(rows)}"]),
        tolerance=f"{WITHIN:.0%} beyond the bound on the sharpness, every seed",
        reproduced=good and bool(parts),
        why=(f"{lost} diverged; " if lost else "")
        + (f"the controller said: {said}" if said else ""),
    )
