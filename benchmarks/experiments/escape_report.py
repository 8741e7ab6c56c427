"""What the escape experiment shows: on the terminal, and as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.data import Images
from benchmarks.escape_case import Config, Prediction, Trace
from stableopt import StabilityMargins, StabilityRegion, TensorBoardSink, UpdateRule, plot

__all__ = ["announce", "compare", "draw", "foretell", "point_out"]

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def announce(config: Config, images: Images, console: Console) -> None:
    """Say what is going to happen."""
    console.print(
        f"[bold]Escape from a sharp minimum[/bold]: {config.data}, {len(images.x):,} training"
        f" images, η = {config.lr:g}.\nGradient descent first, to a loss of {config.target_loss:g};"
        " then SGD from there at the same η.\n",
        highlight=False,
    )


def foretell(config: Config, predictions: Sequence[Prediction], console: Console) -> None:
    """Print the predictions."""
    console.print("\n[bold]Predicted[/bold] from a and s at GD's minimum, before a step of SGD:")
    for size, prediction in zip(config.batch_sizes, predictions, strict=True):
        console.print(f"  B = {size:<3} {prediction.why}", highlight=False)
    console.print()


def compare(
    minimum: StabilityMargins, accuracy: float, traces: Sequence[Trace], console: Console
) -> None:
    """Print the table before and after, and whether each prediction came true."""
    table = Table(title="Before and after")
    table.add_column("")
    table.add_column("GD minimum", justify="right")
    for trace in traces:
        table.add_column(f"SGD, B = {trace.batch_size}", justify="right")
    ends = [trace.history[-1] for trace in traces]

    def row(name: str, form: str, value: Callable[[StabilityMargins], float | None]) -> None:
        cells = [value(margins) for margins in [minimum, *ends]]
        shown = ("–" if c is None else "none" if c == math.inf else format(c, form) for c in cells)
        table.add_row(name, *shown)

    row("training loss", ".1e", lambda m: m.loss)
    accuracies = [accuracy, *(trace.accuracy for trace in traces)]
    table.add_row("test accuracy", *(f"{share:.2%}" for share in accuracies), end_section=True)
    row("sharpness a", ".2f", lambda m: m.sharpness)
    row("limit 2/η", ".2f", lambda m: m.sharpness_limit)
    row("ratio", ".0%", lambda m: m.sharpness_ratio)
    table.add_section()
    row("non-uniformity s", ".2f", lambda m: m.non_uniformity)
    row("limit √B/η, at finite n", ".2f", lambda m: m.non_uniformity_limit)
    row("ratio", ".0%", lambda m: m.non_uniformity_ratio)
    console.print(table)
    console.print("\n[bold]Checked[/bold]: an escape is a tenfold rise of the training loss.")
    for trace in traces:
        said = "escape" if trace.prediction.escapes else "stay"
        done = (
            f"escaped by step {trace.escaped_at}"
            if trace.escaped_at is not None
            else f"stayed (loss at most × {max(trace.losses) / trace.losses[0]:.1f})"
        )
        mark = "[green]✓[/green]" if trace.right else "[red]✗ not as predicted:[/red]"
        console.print(f"  {mark} B = {trace.batch_size:<3} said to {said}: {done}", highlight=False)


def point_out(config: Config, console: Console) -> None:
    """Say where everything is."""
    out = config.out
    console.print(
        f"\nFigures  {out / 'escape.png'}, {out / 'diagram.png'}\nNumbers  {out / 'escape.json'}\n"
        f"Live     tensorboard --logdir {out / 'tensorboard'}\n         {TensorBoardSink.link}",
        highlight=False,
        soft_wrap=True,
    )


def draw(config: Config, gd_history: Sequence[StabilityMargins], traces: Sequence[Trace]) -> None:
    """Draw ``escape.png`` and ``diagram.png``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, sharpness, non_uniformity = figure.subplots(1, 3)
    loss.set(title="training loss", yscale="log")
    sharpness.set(title=plot.SHARPNESS)
    non_uniformity.set(title=plot.NON_UNIFORMITY)
    for trace, colour in zip(traces, COLOURS * len(traces), strict=False):
        loss.plot(trace.steps, trace.losses, color=colour, label=f"B = {trace.batch_size}")
        measured = [m for m in trace.history if m.failure is None]
        steps = [m.step for m in measured]
        style = {"color": colour, "marker": "o", "markersize": 3}
        sharpness.plot(steps, [m.sharpness for m in measured], **style)
        non_uniformity.plot(steps, [m.non_uniformity for m in measured], **style)
        limit = trace.history[0].non_uniformity_limit
        if limit is not None and limit < float("inf"):
            non_uniformity.axhline(limit, color=colour, linestyle="--", linewidth=1)
    dashed = {"color": "black", "linestyle": "--", "linewidth": 1}
    sharpness.axhline(2 / config.lr, label="limit 2/η", **dashed)
    non_uniformity.plot([], [], label="limit √B/η of each B", **dashed)
    for axes in (loss, sharpness, non_uniformity):
        axes.set_xlabel("SGD step")
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    figure.savefig(config.out / "escape.png", dpi=150)

    # One escape tells the story: that of the largest batch that was predicted to leave.
    shown = max(traces, key=lambda trace: (trace.prediction.escapes, trace.batch_size))
    region = StabilityRegion(
        UpdateRule(lr=config.lr), shown.batch_size, shown.history[0].dataset_size
    )
    diagram = plot.diagram(
        region,
        shown.history,
        title=f"SGD with B = {shown.batch_size}, from GD's minimum at the same η",
    )
    before = [(m.sharpness, m.non_uniformity) for m in gd_history if m.failure is None]
    axes = diagram.axes[0]
    axes.plot(*zip(*before, strict=True), color="grey", marker=".", zorder=1, label="GD before")
    axes.legend(loc="best", framealpha=0.9, fontsize="small")
    diagram.savefig(config.out / "diagram.png", dpi=150)
