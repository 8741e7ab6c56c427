"""The figures' vocabulary: one palette, panels, points, traces, and dashed lines for limits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PALETTE",
    "PURPLE",
    "SKY",
    "VERMILION",
    "coloured",
    "finish",
    "limit",
    "panels",
    "plain_log",
    "points",
    "trace",
]

VERMILION, BLUE, GREEN = "#D55E00", "#0072B2", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
GREY, BLACK = "#555555", "#000000"

PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK)
"""The colours of Okabe and Ito, which colour-blind readers can tell apart."""


def coloured(names: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield different names, in the order in which they come, each with its colour.

    >>> list(coloured(["GD", "SGD", "GD"])) == [("GD", BLUE), ("SGD", VERMILION)]
    True
    """
    yield from zip(dict.fromkeys(names), cycle(PALETTE), strict=False)


def panels(
    count: int = 1,
    *,
    rows: int = 1,
    width: float = 5.0,
    height: float = 4.0,
    title: str = "",
    **shared: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, side by side, in one row or several.

    Args:
        count: of panels in a row.
        rows: of panels; the first row's come first.
        width: of each, in inches.
        height: of each, in inches.
        title: of the figure.
        shared: ``sharex``, ``sharey``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height * rows), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False, **shared)
    if title:
        figure.suptitle(title)
    return figure, list(axes.flat)


def points(axes: Axes, x: Any, y: Any, label: str = "", colour: str = BLUE, **style: Any) -> None:
    """Draw values as separate marks."""
    style = {"marker": "o", "linestyle": "none", **style}
    axes.plot(_plain(x), _plain(y), color=colour, label=label, **style)


def trace(axes: Axes, x: Any, y: Any, label: str = "", colour: str = BLUE, **style: Any) -> None:
    """Draw values that follow one another as a line; missing ones are left out."""
    pairs = [(a, b) for a, b in zip(_plain(x), _plain(y), strict=True) if b == b]
    axes.plot(*zip(*pairs, strict=True) if pairs else ([], []), color=colour, label=label, **style)


def limit(
    axes: Axes,
    x: Any = None,
    y: Any = None,
    label: str = "",
    colour: str = BLACK,
) -> None:
    """Draw a limit as a dashed line: across the panel at one value, or through several points.

    Args:
        axes: the panel.
        x: where a vertical line stands; with ``y`` too, the points' coordinates.
        y: where a horizontal line lies.
        label: for the legend.
        colour: of the line. The same value is drawn once, in the first colour.
    """
    style = {"color": colour, "linestyle": "--", "linewidth": 1.0, "label": label}
    if x is not None and y is not None:
        axes.plot(_plain(x), _plain(y), **style)
        return
    gid = f"x = {x}" if y is None else f"y = {y}"
    if any(line.get_gid() == gid for line in axes.lines):
        return
    if y is None:
        axes.axvline(x, gid=gid, **style)
    else:
        axes.axhline(y, gid=gid, **style)


def finish(
    axes: Axes,
    x: str = "",
    y: str = "",
    *,
    log: str = "",
    title: str = "",
    legend: bool = True,
    ticks: Sequence[float] = (),
    **settings: Any,
) -> None:
    """Label a panel, and give it a grid and a legend if anything in it has a label.

    Args:
        axes: the panel.
        x: label of the x-axis.
        y: label of the y-axis.
        log: the logarithmic axes: ``"x"``, ``"y"`` or ``"xy"``.
        title: of the panel.
        legend: whether there is one.
        ticks: the only values that the x-axis labels, such as batch sizes.
        settings: others of ``axes.set``, such as ``ylim``.
    """
    scales = {f"{each}scale": "log" for each in log}
    axes.set(xlabel=x, ylabel=y, title=title, **scales, **settings)
    plain_log(*(getattr(axes, f"{each}axis") for each in log))
    if ticks:
        axes.set_xticks(list(ticks), [f"{value:g}" for value in ticks])
        axes.xaxis.minorticks_off()
    axes.grid(alpha=0.25)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def plain_log(*axes: Axis) -> None:
    """Label logarithmic axes by plain numbers: at 1, 2, 5 times powers of ten, or only at these.

    matplotlib's own labels of less than a decade, 3 x 10^-1 next to 4 x 10^-1, overlap.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        low, high = sorted(axis.get_view_interval())
        if low > 0 and high / low > 1e3:
            continue
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _plain(values: Any) -> Any:
    """Return a column with missing values as NaN, which matplotlib leaves out."""
    numpy = getattr(values, "to_numpy", None)
    return values if numpy is None else numpy(dtype=float, na_value=float("nan"))
