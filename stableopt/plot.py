"""Figures of a run: the sharpness / non-uniformity diagram, and the margins over the steps.

Three examples::

    plot.diagram(StabilityRegion(UpdateRule.from_optimizer(opt), batch_size=32), monitor.history)
    plot.diagram({"before": region, "after the change": other}, points)
    plot.margins(monitor.history).savefig("margins.png")

Figures are built without pyplot: they have no global state, open no window and need no closing, so
that a training loop may draw them. matplotlib is imported on the first call.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stableopt.stability import QUANTITIES, Chart, StabilityMargins, StabilityRegion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Region", "diagram", "margins", "to_rgb"]

Region: TypeAlias = StabilityRegion | tuple[float, float]
"""A region, or the largest sharpness and non-uniformity where only the box is known."""

Target: TypeAlias = tuple[tuple[float, float], tuple[float, float]]
"""``(low, high)`` of the sharpness and of the non-uniformity."""

# Okabe and Ito's palette, distinct under every common colour blindness.
_VERMILION, _BLUE, _GREEN, _PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
_REGION_COLOURS = (_VERMILION, _BLUE, _GREEN, _PURPLE)
_GREY = "#555555"

_MARKERS = ["^", "v", "s", "D", "P", "X", "h", "p"]

_LOG_FROM = 20.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""


def diagram(
    region: Region | Mapping[str, Region] | None = None,
    points: Iterable[StabilityMargins | Sequence[float]] = (),
    *,
    target: Target | None = None,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""Draw the sharpness / non-uniformity diagram of Wu, Ma & E (2018).

    A region's box, equation (9), is dashed, as in the paper's figures; the exact region of a
    one-dimensional problem, for plain SGD the half-ellipse
    :math:`(1-\eta a)^2 + \eta^2 p s^2 \le 1`, is filled. Full-batch gradient descent has no limit on
    the non-uniformity: its region is a vertical line and the strip on its left.

    Args:
        region: the region; or several by label, as before and after a change of the learning rate;
            or ``None``.
        points: the trajectory, oldest first: :class:`StabilityMargins` or pairs (sharpness,
            non-uniformity). Points without either are left out. With a preconditioner, sharpness
            and non-uniformity are the preconditioned ones.
        target: a box to draw: ``(low, high)`` of the sharpness and of the non-uniformity, infinity
            for an open end.
        marks: pairs (step, label) of changes during the run, drawn on the trajectory at that step.
            For points that are pairs, the step is the number of the point.
        title: a title, or ``None``.
        ax: axes to draw into; a new figure's by default.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an invalid region, or a point that is not a pair.

    >>> from stableopt import UpdateRule
    >>> region = StabilityRegion(UpdateRule(lr=0.1), batch_size=4)
    >>> figure = diagram(region, [(25.0, 4.0), (19.0, 6.0)])
    >>> [round(float(limit), 2) for limit in figure.axes[0].get_xlim()]
    [0.0, 27.5]
    """
    regions = _by_label(region)
    items = list(points)
    steps, path, unit = _path(items)
    axes: Any = _figure((5.4, 4.2)).add_subplot() if ax is None else ax
    figure: Figure = axes.get_figure()

    boxes = [_box(each) for each in regions.values()]
    left = float(min([0.0, *(low for low, _, _ in boxes), *path[:, 0]]))
    wanted = [] if target is None else [*target]
    right = _reach([a for _, a, _ in boxes], path[:, 0], *wanted[:1])
    top = _reach([s for _, _, s in boxes], path[:, 1], *wanted[1:])
    axes.set_xlim(left * 1.1, right)
    axes.set_ylim(0.0, top)

    for index, (label, each) in enumerate(regions.items()):
        colour = _REGION_COLOURS[index % len(_REGION_COLOURS)]
        _draw_region(axes, each, label, colour, right=right, top=top)
    if target is not None:
        _draw_target(axes, target, left, right, top)
    if len(path):
        _draw_path(axes, steps, path, unit)
        _draw_marks(axes, steps, path, marks)
    own = any(isinstance(p, StabilityMargins) and p.preconditioned_sharpness for p in items)
    axes.set_xlabel(_chart("preconditioned_sharpness" if own else "sharpness").label)
    axes.set_ylabel(_chart("non_uniformity").label)
    if title is not None:
        axes.set_title(title)
    axes.set_axisbelow(True)
    _finish(axes)
    return figure


def margins(
    history: Iterable[StabilityMargins | Mapping[str, Any]],
    *,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
) -> Figure:
    """Draw sharpness and non-uniformity over the steps, each with its limit.

    With a preconditioner, the sharpness is the preconditioned one, which has the limit. Other
    quantities that have a chart and were measured follow below. Values above a limit are shaded.
    Failed measurements are crosses at the bottom of a panel. An axis that spans more than a factor of
    20 is logarithmic if all its numbers are positive.

    Args:
        history: a monitor's ``history``, or records with their ``step``, such as the lines that
            :class:`~stableopt.JSONLinesSink` wrote.
        marks: pairs (step, label) of changes during the run, drawn as vertical lines.
        title: a title, or ``None``.

    Returns:
        The figure, with one axes for each quantity.

    Raises:
        ImportError: without matplotlib.

    >>> history = [StabilityMargins(step=t, sharpness=5.0 + t, sharpness_limit=20.0) for t in range(9)]
    >>> figure = margins(history)
    >>> [ax.get_ylabel().split()[0] for ax in figure.axes]
    ['sharpness', 'non-uniformity']
    """
    records = [item if isinstance(item, Mapping) else _record(item) for item in history]
    steps, changes = _column(records, "step"), list(marks)
    failed = np.array(
        [bool(r.get("failed")) or r.get("failure") is not None for r in records], bool
    )
    names = _shown(records)
    figure: Figure = _figure(figsize=(7.0, 2.8 * len(names)))
    panels = figure.subplots(len(names), 1, sharex=True)
    for axes, name in zip(panels, names, strict=True):
        values, limits = _column(records, name), _column(records, f"{name}_limit")
        _draw_panel(axes, steps, values, limits, name)
        if failed.any():
            transform, bottom = axes.get_xaxis_transform(), np.full(failed.sum(), 0.03)
            style = {"color": _GREY, "label": "failed", "transform": transform}
            axes.plot(steps[failed], bottom, "x", **style)
        for index, what in enumerate(dict.fromkeys(what for _, what in changes)):
            line = {"color": _GREY, "linestyle": (0, (1 + 2 * index, 2)), "linewidth": 0.8}
            for step, each in changes:
                if each == what:
                    axes.axvline(step, **line)
            axes.plot([], [], label=what, **line)
        axes.set_ylabel(_chart(name).label)
        _finish(axes)
    panels[-1].set_xlabel("step")
    if title is not None:
        figure.suptitle(title)
    return figure


def to_rgb(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of ``figure``, ``(height, width, 3)``.

    >>> to_rgb(diagram((20.0, 20.0))).shape
    (420, 540, 3)
    """
    backend = _import("matplotlib.backends.backend_agg")
    canvas = backend.FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def require_matplotlib() -> None:
    """Raise an ``ImportError`` with the command to install it, if matplotlib is missing."""
    _import("matplotlib.figure")


# -- the diagram -----------------------------------------------------------------------------------


def _by_label(region: Region | Mapping[str, Region] | None) -> dict[str, Region]:
    if region is None:
        return {}
    regions = dict(region) if isinstance(region, Mapping) else {"": region}
    for each in regions.values():
        if isinstance(each, StabilityRegion):
            continue
        if not (isinstance(each, tuple) and len(each) == 2 and all(limit > 0 for limit in each)):
            raise ValueError(
                f"region: {each!r} is neither a StabilityRegion nor a pair of positive limits"
                " (largest sharpness, largest non-uniformity)"
            )
    return regions


def _box(region: Region) -> tuple[float, float, float]:
    """Return the smallest and the largest sharpness, and the largest non-uniformity."""
    if isinstance(region, StabilityRegion):
        return region.min_sharpness, region.max_sharpness, region.max_non_uniformity
    return 0.0, *region


def _path(
    points: Iterable[StabilityMargins | Sequence[float]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Return the times ``(n,)``, the points ``(n, 2)``, and the unit of the times."""
    items = list(points)
    of_margins = bool(items) and all(isinstance(item, StabilityMargins) for item in items)
    rows: list[tuple[float, float, float]] = []
    for index, item in enumerate(items):
        if isinstance(item, StabilityMargins):
            time = item.step if of_margins else index
            pair = (item.limited_sharpness, item.non_uniformity)
        else:
            time, pair = index, tuple(item)  # type: ignore[assignment]
            if len(pair) != 2:
                raise ValueError(f"points: {item!r} is not a pair (sharpness, non-uniformity)")
        numbers = [math.nan if value is None else float(value) for value in pair]
        if all(math.isfinite(value) for value in numbers):
            rows.append((float(time), numbers[0], numbers[1]))
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1:], "step" if of_margins else "measurement"


def _reach(
    limits: Sequence[float], values: NDArray[np.float64], ends: Iterable[float] = ()
) -> float:
    """Return the end of an axis that shows every finite limit, and every value."""
    finite = (limit for limit in (*limits, *ends) if math.isfinite(limit))
    largest = max([0.0, *finite, *values])
    return 1.1 * float(largest) if largest > 0 else 1.0


def _draw_region(
    axes: Any, region: Region, label: str, colour: str, *, right: float, top: float
) -> None:
    low, a, s = _box(region)
    name = f"{label}: " if label else ""
    edge = {"color": colour, "linestyle": "--", "linewidth": 1.6}
    fill = {"color": colour, "alpha": 0.13, "linewidth": 0}
    if isinstance(region, StabilityRegion):
        if math.isfinite(a) and math.isfinite(s):
            sharpness, height = region.boundary(kind="exact").T
            axes.fill_between(sharpness, height, label=f"{name}exact in one dimension", **fill)
        else:
            axes.fill_between([low, min(a, right)], top, label=f"{name}stable", **fill)
    # Only the sides of the box that are limits.
    if math.isfinite(a):
        ends = ([a, a, low], [0, s, s]) if math.isfinite(s) else ([a, a], [0, top])
        axes.plot(*ends, label=f"{name}limits", **edge)
    elif math.isfinite(s):
        axes.plot([low, right], [s, s], label=f"{name}limits", **edge)


def _draw_path(axes: Any, steps: NDArray[np.float64], path: NDArray[np.float64], unit: str) -> None:
    x, y = path.T
    axes.plot(x, y, color=_GREY, linewidth=0.7, alpha=0.6, zorder=2)
    # The brightest end of viridis is lost on white.
    span = (steps[0], steps[-1] + 0.12 * (steps[-1] - steps[0]))
    dots = axes.scatter(
        x, y, c=steps, cmap="viridis", vmin=span[0], vmax=span[1], s=16, zorder=3, clip_on=False
    )
    ring = {"markeredgecolor": "black", "linestyle": "none", "zorder": 4, "clip_on": False}
    if len(path) > 1:
        bar = axes.get_figure().colorbar(dots, ax=axes, pad=0.02)
        bar.set_label(unit)
        bar.ax.set_ylim(steps[0], steps[-1])
        axes.plot(x[0], y[0], "o", markersize=9, markerfacecolor="white", label="start", **ring)
    end = dots.cmap(dots.norm(steps[-1]))
    axes.plot(x[-1], y[-1], "*", markersize=15, markerfacecolor=end, label="end", **ring)


def _draw_target(axes: Any, target: Target, left: float, right: float, top: float) -> None:
    (a_low, a_high), (s_low, s_high) = target
    # An open end is drawn beyond the axes, where its side does not show.
    x = (a_low if a_low > 0 else 1.2 * left - 0.1 * right, min(a_high, 1.2 * right))
    y = (s_low if s_low > 0 else -0.1 * top, min(s_high, 1.2 * top))
    corners = [[x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]]]
    axes.fill(*corners, color=_GREEN, alpha=0.10, linewidth=0, zorder=0)
    axes.plot(*corners, color=_GREEN, linewidth=1.4, linestyle=":", label="target")


def _draw_marks(
    axes: Any,
    steps: NDArray[np.float64],
    path: NDArray[np.float64],
    marks: Iterable[tuple[float, str]],
) -> None:
    labels: dict[str, list[int]] = {}
    for step, label in marks:
        # The last measurement up to that step.
        index = max(int(np.searchsorted(steps, step, side="right")) - 1, 0)
        labels.setdefault(label, []).append(index)
    for (label, indices), marker in zip(labels.items(), _MARKERS * len(labels), strict=False):
        style = {"markerfacecolor": "none", "markeredgecolor": _VERMILION, "linestyle": "none"}
        axes.plot(*path[indices].T, marker, markersize=8, zorder=5, label=label, **style)


# -- the margins -----------------------------------------------------------------------------------


def _record(margins: StabilityMargins) -> dict[str, float]:
    return {"step": margins.step, **margins.record()}


def _shown(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the quantities to draw: both sides of the box, then what else was measured."""
    charted = [name for name, quantity in QUANTITIES.items() if quantity.chart is not None]
    measured = [name for name in charted if np.isfinite(_column(records, name)).any()]
    own = "preconditioned_sharpness"
    box = [own if own in measured else "sharpness", "non_uniformity"]
    return box + [name for name in measured if name not in (*box, "sharpness")]


def _column(records: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """Return a number of every record; NaN, which matplotlib leaves out, where there is none."""
    values = (record.get(name) for record in records)
    column = np.array([math.nan if v is None else float(v) for v in values], dtype=np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def _draw_panel(
    axes: Any,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    limits: NDArray[np.float64],
    name: str,
) -> None:
    measured = values[np.isfinite(values)]
    if not measured.size:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=_GREY)
        return
    finite = limits[np.isfinite(limits)]
    marker = "o" if measured.size < 60 else ""
    title = _chart(name).title
    label = title if finite.size else f"{title} (without limit)"
    axes.plot(steps, values, marker=marker, markersize=3, color=_BLUE, linewidth=1.3, label=label)
    shown = np.concatenate([measured, finite])
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high > _LOG_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(min(0.0, low * 1.1), high * 1.1 if high > 0 else 1.0)
    if finite.size:
        # A limit follows from settings, which jump between two measurements.
        style = {"linestyle": "--", "color": _VERMILION, "linewidth": 1.6}
        axes.plot(steps, limits, drawstyle="steps-post", label="limit", **style)
        ceiling = np.full_like(limits, axes.get_ylim()[1])
        axes.fill_between(
            steps, limits, ceiling, step="post", color=_VERMILION, alpha=0.08, linewidth=0
        )


# -- matplotlib ------------------------------------------------------------------------------------


def _chart(name: str) -> Chart:
    chart = QUANTITIES[name].chart
    assert chart is not None
    return chart


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, fontsize="small")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("stableopt.plot needs matplotlib: pip install stableopt[plot]") from error


def _figure(figsize: tuple[float, float]) -> Any:
    figure = _import("matplotlib.figure").Figure(figsize=figsize, dpi=100, layout="constrained")
    _import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
