"""`diagram`: the sharpness / non-uniformity diagram with stability regions, trajectory and marks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stableopt.plot.canvas import BLUE, GREEN, GREY, PURPLE, VERMILION, chart_of, figure_of, finish
from stableopt.stability import StabilityMargins, StabilityRegion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Region", "diagram"]

Region: TypeAlias = StabilityRegion | tuple[float, float]
"""A region, or the pair of largest sharpness and largest non-uniformity if only the box is known."""

Target: TypeAlias = tuple[tuple[float, float], tuple[float, float]]
"""``(low, high)`` of the sharpness and of the non-uniformity."""

_REGION_COLOURS = (VERMILION, BLUE, GREEN, PURPLE)

_MARKERS = ["^", "v", "s", "D", "P", "X", "h", "p"]


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

    A region's box, equation (9), is dashed, as in the paper's figures. The exact region of a
    one-dimensional problem is filled; for plain SGD it is the half-ellipse
    :math:`(1-\eta a)^2 + \eta^2 p s^2 \le 1`. Full-batch gradient descent has no limit on the
    non-uniformity: its region is a vertical line and the strip on its left.

    Args:
        region: the region; several by label, as before and after a change of the learning rate; or
            ``None``.
        points: the trajectory, oldest first: :class:`StabilityMargins` or pairs (sharpness,
            non-uniformity). Points that lack one of them are left out; if all do, the diagram says
            "not measured". With a preconditioner both are the preconditioned quantities.
        target: a box to draw: ``(low, high)`` of the sharpness and of the non-uniformity, infinity
            for an open end.
        marks: pairs (step, label) of changes during the run, drawn on the trajectory at that step.
            If points are pairs, the step is the index of the point.
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
    axes: Any = figure_of((5.4, 4.2)).add_subplot() if ax is None else ax
    figure: Figure = axes.get_figure()

    boxes = [_box(area) for area in regions.values()]
    left = float(min([0.0, *(low for low, _, _ in boxes), *path[:, 0]]))
    target_a, target_s = ((), ()) if target is None else target
    right = _axis_end([a for _, a, _ in boxes], path[:, 0], target_a)
    top = _axis_end([s for _, _, s in boxes], path[:, 1], target_s)
    axes.set_xlim(left * 1.1, right)
    axes.set_ylim(0.0, top)

    for index, (label, area) in enumerate(regions.items()):
        colour = _REGION_COLOURS[index % len(_REGION_COLOURS)]
        _draw_region(axes, area, label, colour, right=right, top=top)
    if target is not None:
        _draw_target(axes, target, left, right, top)
    if len(path):
        _draw_path(axes, steps, path, unit)
        _draw_marks(axes, steps, path, marks)
    elif items:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    preconditioned = any(
        isinstance(item, StabilityMargins) and item.preconditioned_sharpness for item in items
    )
    axes.set_xlabel(chart_of("preconditioned_sharpness" if preconditioned else "sharpness").label)
    axes.set_ylabel(chart_of("non_uniformity").label)
    if title is not None:
        axes.set_title(title)
    axes.set_axisbelow(True)
    finish(axes)
    return figure


def _by_label(region: Region | Mapping[str, Region] | None) -> dict[str, Region]:
    if region is None:
        return {}
    regions = dict(region) if isinstance(region, Mapping) else {"": region}
    for box in regions.values():
        if isinstance(box, StabilityRegion):
            continue
        if not (isinstance(box, tuple) and len(box) == 2 and all(limit > 0 for limit in box)):
            raise ValueError(
                f"region: {box!r} is neither a StabilityRegion nor a pair of positive limits"
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


def _axis_end(
    limits: Sequence[float], values: NDArray[np.float64], target: Iterable[float]
) -> float:
    """Return the end of an axis that shows every value, and every finite limit and target bound."""
    finite = (limit for limit in (*limits, *target) if math.isfinite(limit))
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
    # A side of the box at infinity is not drawn.
    if math.isfinite(a):
        ends = ([a, a, low], [0, s, s]) if math.isfinite(s) else ([a, a], [0, top])
        axes.plot(*ends, label=f"{name}limits", **edge)
    elif math.isfinite(s):
        axes.plot([low, right], [s, s], label=f"{name}limits", **edge)


def _draw_path(axes: Any, steps: NDArray[np.float64], path: NDArray[np.float64], unit: str) -> None:
    x, y = path.T
    axes.plot(x, y, color=GREY, linewidth=0.7, alpha=0.6, zorder=2)
    # The scale ends beyond the last step: the brightest yellow of viridis is invisible on white.
    scale = {"vmin": steps[0], "vmax": steps[-1] + 0.12 * (steps[-1] - steps[0])}
    dots = axes.scatter(x, y, c=steps, cmap="viridis", **scale, s=16, zorder=3, clip_on=False)
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
    # The side of an open end lies beyond the axes, so it does not show.
    x = (a_low if a_low > 0 else 1.2 * left - 0.1 * right, min(a_high, 1.2 * right))
    y = (s_low if s_low > 0 else -0.1 * top, min(s_high, 1.2 * top))
    corners = [[x[0], x[1], x[1], x[0], x[0]], [y[0], y[0], y[1], y[1], y[0]]]
    axes.fill(*corners, color=GREEN, alpha=0.10, linewidth=0, zorder=0)
    axes.plot(*corners, color=GREEN, linewidth=1.4, linestyle=":", label="target")


def _draw_marks(
    axes: Any,
    steps: NDArray[np.float64],
    path: NDArray[np.float64],
    marks: Iterable[tuple[float, str]],
) -> None:
    labels: dict[str, list[int]] = {}
    for step, label in marks:
        # The last measurement at or before the step.
        index = max(int(np.searchsorted(steps, step, side="right")) - 1, 0)
        labels.setdefault(label, []).append(index)
    for (label, indices), marker in zip(labels.items(), _MARKERS * len(labels), strict=False):
        style = {"markerfacecolor": "none", "markeredgecolor": VERMILION, "linestyle": "none"}
        axes.plot(*path[indices].T, marker, markersize=8, zorder=5, label=label, **style)
