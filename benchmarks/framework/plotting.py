"""Building blocks of the figures: a palette, panels, points, traces, and dashed lines for limits."""

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
"""The colour-blind safe palette of Okabe and Ito."""


def coloured(names: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """Yield each distinct name with its colour, in order of first occurrence.

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
    """Return a figure and the list of its panels, row by row.

    Args:
        count: panels per row.
        rows: number of rows.
        width: width of a panel in inches.
        height: height of a panel in inches.
        title: title of the figure.
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
    """Draw values as a line; NaNs are skipped without a gap."""
    pairs = [(a, b) for a, b in zip(_plain(x), _plain(y), strict=True) if b == b]
    axes.plot([a for a, _ in pairs], [b for _, b in pairs], color=colour, label=label, **style)


def limit(
    axes: Axes,
    x: Any = None,
    y: Any = None,
    label: str = "",
    colour: str = BLACK,
) -> None:
    """Draw a limit as a dashed line: across the panel at one value, or through points.

    Args:
        axes: the panel.
        x: position of a vertical line; together with ``y``, the points' coordinates.
        y: position of a horizontal line.
        label: label in the legend.
        colour: colour of the line. A value is drawn only once, in its first colour.
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
    """Label a panel, add a grid, and add a legend if any of its artists has a label.

    Args:
        axes: the panel.
        x: label of the x-axis.
        y: label of the y-axis.
        log: the logarithmic axes: ``"x"``, ``"y"`` or ``"xy"``.
        title: title of the panel.
        legend: whether to add a legend.
        ticks: all tick labels of the x-axis, such as batch sizes.
        settings: other arguments of ``axes.set``, such as ``ylim``.
    """
    scales = {f"{axis}scale": "log" for axis in log}
    axes.set(xlabel=x, ylabel=y, title=title, **scales, **settings)
    plain_log(*(getattr(axes, f"{axis}axis") for axis in log))
    if ticks:
        axes.set_xticks(list(ticks), [f"{value:g}" for value in ticks])
        axes.xaxis.minorticks_off()
    axes.grid(alpha=0.25)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def plain_log(*axes: Axis) -> None:
    """Label logarithmic axes of up to three decades with plain numbers at 1, 2, 5 × 10^k.

    On short axes matplotlib's own labels, such as 3 x 10^-1 and 4 x 10^-1, overlap.
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
    """Return a column as floats; missing values become NaN, which matplotlib skips."""
    to_numpy = getattr(values, "to_numpy", None)
    return values if to_numpy is None else to_numpy(dtype=float, na_value=float("nan"))
