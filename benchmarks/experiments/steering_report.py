"""What the steering experiment shows: on the terminal, in its summary, and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.steering_case import REGIONS, Config, Outcome
from stableopt import plot
from stableopt.adapt.decision import marks

__all__ = ["announce", "compare", "draw", "point_out", "summary"]

WITHIN = 0.1
"""Relative distance to the target that counts as there."""

BACK = 1e-3
"""Training loss that counts as trained."""


def announce(config: Config, console: Console) -> None:
    """Say what is going to happen."""
    console.print(
        f"[bold]Steering[/bold]: {config.data}, {config.n:,} training images, {config.seeds} seeds."
        f"\nGradient descent at η = {config.lr:g} to a loss of {config.start_loss:g}; from there to"
        f" {len(REGIONS)} regions, with a budget of {config.steps:,} steps"
        f" ({config.sgd_steps:,} with small batches).\n",
        highlight=False,
    )


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each method and region what its seeds have in common."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["region"]), []).append(row)
    return [
        {"method": method, "region": region, **_common(group)}
        for (method, region), group in groups.items()
    ]


def _common(group: list[dict[str, Any]]) -> dict[str, Any]:
    alive = [row for row in group if not row["failed"]]
    ratios = [row["sharpness_to_target"] for row in alive]
    ratios = [ratio for ratio in ratios if ratio is not None]
    uniform = [
        row["non_uniformity"] <= row["target_non_uniformity"]
        for row in alive
        if row["target_non_uniformity"] is not None
    ]
    accuracies = [row["test_accuracy"] for row in group]
    return {
        "seeds": len(group),
        "diverged": len(group) - len(alive),
        "trained": sum(row["loss"] < BACK for row in alive),
        "sharpness": _mean([row["sharpness"] for row in alive]),
        "non_uniformity": _mean([row["non_uniformity"] for row in alive]),
        "sharpness_to_target": ratios,
        "within_10_percent": sum(abs(ratio - 1) <= WITHIN for ratio in ratios),
        "uniform_enough": sum(uniform) if uniform else None,
        "test_accuracy": mean(accuracies),
        "test_accuracy_deviation": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "largest_loss": max((row["largest_loss"] or 0.0 for row in alive), default=0.0),
        "steps": mean(row["steps"] for row in group),
        "products": mean(row["products"] for row in group),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def compare(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the summary as a table."""
    table = Table(title="Where each method ended (means over seeds)")
    for heading, justify in (
        ("to", "left"),
        ("by", "left"),
        ("a", "right"),
        ("a / target", "right"),
        ("s", "right"),
        ("s in target", "right"),
        (f"loss < {BACK:g}", "right"),
        ("diverged", "right"),
        ("test accuracy", "right"),
        ("steps", "right"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in summary(rows):
        seeds, ratios = row["seeds"], row["sharpness_to_target"]
        spread = f"{min(ratios):.3f}–{max(ratios):.3f}" if ratios else "–"
        uniform = row["uniform_enough"]
        table.add_row(
            row["region"],
            row["method"],
            _shown(row["sharpness"]),
            spread,
            _shown(row["non_uniformity"]),
            "–" if uniform is None else f"{uniform}/{seeds}",
            f"{row['trained']}/{seeds}",
            f"{row['diverged']}/{seeds}",
            f"{row['test_accuracy']:.2%} ± {row['test_accuracy_deviation']:.2%}",
            f"{row['steps']:,.0f}",
        )
    console.print(table)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def draw(config: Config, outcomes: Sequence[Outcome]) -> None:
    """Draw the trajectories of the first seed: ``sharpness.png`` and a diagram for each noisy run."""
    from matplotlib.figure import Figure

    first = [
        each
        for each in outcomes
        if each.seed == config.seed and each.method == "steered" and each.history
    ]
    names = [each for each in first if each.region in REGIONS]
    figure = Figure(figsize=(3.2 * len(names), 5.4), layout="constrained")
    panels = figure.subplots(2, len(names), sharex="col", squeeze=False)
    for (top, bottom), outcome in zip(panels.T, names, strict=True):
        good = [m for m in outcome.history if m.failure is None]
        steps = [m.step for m in good]
        top.plot(steps, [m.sharpness for m in good], color="#0072B2", label="sharpness")
        limits = [m.sharpness_limit for m in good]
        style = {"color": "#D55E00", "linestyle": "--", "linewidth": 1}
        top.plot(steps, limits, label="2/η", **style)
        aim = None if outcome.target is None else outcome.target.aim
        if aim is not None:
            top.axhline(aim, color="#009E73", linestyle=":", label="target")
        top.set_title(outcome.region)
        bottom.semilogy(steps, [m.loss for m in good], color="#555555")
        bottom.set_xlabel("step")
        for axes in (top, bottom):
            axes.grid(alpha=0.25)
    panels[0, 0].legend(frameon=False, fontsize="small")
    panels[0, 0].set_ylabel("sharpness")
    panels[1, 0].set_ylabel("training loss")
    figure.savefig(config.out / "sharpness.png", dpi=120)
    for outcome in names:
        if outcome.target is None or outcome.history[0].non_uniformity is None:
            continue
        bounds = (outcome.target.sharpness, outcome.target.non_uniformity)
        shown = [(step, label) for step, label in marks(d for d in outcome.decisions if d.changes)]
        diagram = plot.diagram(
            None,
            outcome.history,
            target=bounds,  # type: ignore[arg-type]
            marks=shown,
            title=f"steered: {outcome.region}",
        )
        diagram.savefig(config.out / f"diagram-{outcome.region.replace(' ', '-')}.png", dpi=120)


def point_out(config: Config, console: Console) -> None:
    """Say where everything is."""
    console.print(
        f"\nNumbers  {config.out / 'steering.json'}\nFigures  {config.out / 'sharpness.png'},"
        f" {config.out / 'diagram-both.png'}",
        highlight=False,
        soft_wrap=True,
    )
