"""The figures of the escape experiment, from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.framework.experiment import Rows
from benchmarks.framework.plotting import plain_log
from stableopt import UpdateRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["scatter", "traces"]

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def traces(rows: Rows, lr: float) -> Figure:
    """Draw loss, sharpness and non-uniformity after the switch, and the path in the diagram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, sharpness, non_uniformity, diagram = figure.subplots(1, 4)
    rows = [r for r in rows if r["random_labels"] == rows[0]["random_labels"]]
    for how, colour in zip(dict.fromkeys(r["how"] for r in rows), COLOURS * 3, strict=False):
        its = [r for r in rows if r["how"] == how]
        seen = [r for r in its if r["loss"] is not None]
        loss.plot([r["step"] for r in seen], [r["loss"] for r in seen], color=colour, label=how)
        measured = [r for r in its if r["sharpness"] is not None]
        steps = [r["step"] for r in measured]
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1}
        sharpness.plot(steps, [r["sharpness"] for r in measured], **style)
        known = [r for r in measured if r["non_uniformity"] is not None]
        ends = [r["non_uniformity"] for r in known]
        non_uniformity.plot([r["step"] for r in known], ends, **style)
        diagram.plot([r["sharpness"] for r in known], ends, **style)
        size, n = its[0]["batch_size"], its[0]["n"]
        if size is not None:
            limit = UpdateRule(lr=its[0]["lr"]).max_non_uniformity(size, n)
            for axes in (non_uniformity, diagram):
                axes.axhline(limit, color=colour, linestyle="--", linewidth=1)
        _limit(sharpness, 2 / its[0]["lr"], colour)
    non_uniformity.set(title="non-uniformity s, limits √B/η", yscale="log")
    plain_log(non_uniformity.yaxis)
    diagram.axvline(2 / lr, color="black", linestyle="--", linewidth=1)
    loss.set(yscale="log", title="training loss")
    sharpness.set(title="sharpness a, limits 2/η", ylim=(0, None))
    diagram.set(
        title="where they go", xlabel="sharpness a", ylabel="non-uniformity s", xlim=(0, None)
    )
    for axes in (loss, sharpness, non_uniformity):
        axes.set_xlabel("step after the switch")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    loss.legend(frameon=False, fontsize=8)
    return figure


def _limit(axes: Axes, value: float, colour: str) -> None:
    # Several runs may share a limit: one line is enough.
    if not any(line.get_gid() == f"{value}" for line in axes.lines):
        axes.axhline(value, color=colour, linestyle="--", linewidth=1, gid=f"{value}")


def scatter(rows: Rows, data: str) -> Figure:
    """Draw test accuracy against sharpness."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for label, colour in zip(dict.fromkeys(r["from"] for r in rows), COLOURS * 3, strict=False):
        its = [r for r in rows if r["from"] == label]
        axes.plot(
            [r["sharpness"] for r in its],
            [100 * r["test_accuracy"] for r in its],
            "o",
            color=colour,
            label=label,
        )
    axes.set(xscale="log", xlabel="sharpness a", ylabel="test accuracy, %", title=data)
    plain_log(axes.xaxis)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure
