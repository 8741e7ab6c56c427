"""Pictures of a run: the sharpness / non-uniformity diagram, and the margins over the steps.

Three examples::

    plot.diagram(StabilityRegion(UpdateRule.from_optimizer(opt), batch_size=32), monitor.history)
    plot.diagram({"before": region, "after the change": other}, points)
    plot.margins(monitor.history).savefig("margins.png")

Figures are built without pyplot: nothing here has global state, opens a window or needs closing, so
that all of it may be called from inside a training loop. matplotlib is imported on the first call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stableopt.stability import StabilityMargins, StabilityRegion

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Region", "diagram", "margins", "to_rgb"]

Region: TypeAlias = StabilityRegion | tuple[float, float]
"""A region, or the largest sharpness and non-uniformity where only the box is known."""

SHARPNESS = "sharpness $\\lambda_{\\max}(H)$"
PRECONDITIONED = "preconditioned sharpness $\\lambda_{\\max}(PH)$"
NON_UNIFORMITY = "non-uniformity $\\lambda_{\\max}(\\Sigma)^{1/2}$"

# Okabe and Ito's palette: told apart under every common colour blindness.
_VERMILION, _BLUE, _GREEN, _PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
_REGION_COLOURS = (_VERMILION, _BLUE, _GREEN, _PURPLE)
_GREY = "#555555"

_MARKERS = ["^", "v", "s", "D", "P", "X", "h", "p"]

_LOG_FROM = 20.0
"""An axis is logarithmic where its largest number is so many times its smallest."""


def diagram(
    region: Region | Mapping[str, Region] | None = None,
    points: Iterable[StabilityMargins | Sequence[float]] = (),
    *,
    target: tuple[tuple[float, float], tuple[float, float]] | None = None,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    r"""Draw the sharpness / non-uniformity diagram of Wu, Ma & E (2018).

    A region's box, equation (9), is dashed, as in the paper's figures; the exact region of a
    one-dimensional problem, for plain SGD the half-ellipse
    :math:`(1-\eta a)^2 + \eta^2 p s^2 \le 1`, is filled. Full-batch gradient descent, without limit
    on the non-uniformity, has a vertical line and fills the strip on its left.

    Args:
        region: the region; or several by label, as before and after a change of the learning rate;
            or ``None``.
        points: the trajectory, oldest first: :class:`StabilityMargins` or pairs (sharpness,
            non-uniformity). Those that lack either are left out. The sharpness is the preconditioned
            one where the optimizer has a preconditioner, as the non-uniformity is.
        target: a box to draw: ``(low, high)`` of the sharpness and of the non-uniformity, infinity
            for an open end.
        marks: pairs (step, label) of what was changed in the run; each is drawn on the trajectory
            where it was at that step. Steps are numbers of points where these are pairs.
        title: a title, or ``None``.
        ax: axes to draw into; a new figure's by default.

    Returns:
        The figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a region that is neither, or a point that is not a pair.

    >>> from stableopt import UpdateRule
    >>> region = StabilityRegion(UpdateRule(lr=0.1), batch_size=4)
    >>> figure = diagram(region, [(25.0, 4.0), (19.0, 6.0)])
    >>> [round(float(limit), 2) for limit in figure.axes[0].get_xlim()]
    [0.0, 27.5]
    """
    regions = _by_label(region)
    items = list(points)
    steps, path, unit = _path(items)
    axes: Any = _new_axes() if ax is None else ax
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
        _draw_target(axes, target, left=left, right=right, top=top)
    if len(path):
        _draw_path(axes, steps, path, unit)
        _draw_marks(axes, steps, path, marks)
    own = any(isinstance(p, StabilityMargins) and p.preconditioned_sharpness for p in items)
    axes.set_xlabel(PRECONDITIONED if own else SHARPNESS)
    axes.set_ylabel(NON_UNIFORMITY)
    if title is not None:
        axes.set_title(title)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, fontsize="small")
    return figure


def margins(
    history: Iterable[StabilityMargins | Mapping[str, Any]],
    *,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
) -> Figure:
    """Draw sharpness and non-uniformity over the steps, each with its limit.

    The sharpness is the preconditioned one where the optimizer has a preconditioner: the limit is its.
    What is above a limit is shaded. Failed measurements are crosses at the foot of a panel. An axis
    that spans more than a factor of 20 is logarithmic, unless something on it is not positive.

    Args:
        history: a monitor's ``history``, or records with their ``step``, such as the lines that
            :class:`~stableopt.JSONLinesSink` wrote.
        marks: pairs (step, label) of what was changed in the run: vertical lines.
        title: a title, or ``None``.

    Returns:
        The figure, with two axes.

    Raises:
        ImportError: without matplotlib.

    >>> history = [StabilityMargins(step=t, sharpness=5.0 + t, sharpness_limit=20.0) for t in range(9)]
    >>> figure = margins(history)
    >>> [ax.get_ylabel().split()[0] for ax in figure.axes]
    ['sharpness', 'non-uniformity']
    """
    items = list(history)
    figure: Figure = _figure(figsize=(7.0, 5.6))
    panels = figure.subplots(2, 1, sharex=True)
    steps = _column(items, "step")
    changes = list(marks)
    failed = np.array([_has_failed(item) for item in items], dtype=bool)
    preconditioned = bool(np.isfinite(_column(items, "preconditioned_sharpness")).any())
    shown = (
        ("preconditioned_sharpness", PRECONDITIONED)
        if preconditioned
        else ("sharpness", SHARPNESS),
        ("non_uniformity", NON_UNIFORMITY),
    )
    for axes, (name, label) in zip(panels, shown, strict=True):
        values, limits = _column(items, name), _column(items, f"{name}_limit")
        _draw_panel(axes, steps, values, limits, label.split(" $")[0])
        if failed.any():
            axes.plot(
                steps[failed],
                np.full(failed.sum(), 0.03),
                "x",
                color=_GREY,
                transform=axes.get_xaxis_transform(),
                label="failed",
            )
        for index, what in enumerate(dict.fromkeys(what for _, what in changes)):
            style = (0, (1 + 2 * index, 2))
            for step, each in changes:
                if each == what:
                    axes.axvline(step, color=_GREY, linestyle=style, linewidth=0.8)
            axes.plot([], [], color=_GREY, linestyle=style, linewidth=0.8, label=what)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", framealpha=0.9, fontsize="small")
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
    """Raise an ``ImportError`` that says what to install, if matplotlib is missing."""
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
    # The sides of the box that are limits; the others are where the quantities end.
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


def _draw_target(
    axes: Any,
    target: tuple[tuple[float, float], tuple[float, float]],
    *,
    left: float,
    right: float,
    top: float,
) -> None:
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
        # Where the trajectory was: the last measurement up to then.
        index = max(int(np.searchsorted(steps, step, side="right")) - 1, 0)
        labels.setdefault(label, []).append(index)
    for (label, indices), marker in zip(labels.items(), _MARKERS * len(labels), strict=False):
        style = {"markerfacecolor": "none", "markeredgecolor": _VERMILION, "linestyle": "none"}
        axes.plot(*path[indices].T, marker, markersize=8, zorder=5, label=label, **style)


# -- the margins -----------------------------------------------------------------------------------


def _get(item: StabilityMargins | Mapping[str, Any], name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _column(
    items: Sequence[StabilityMargins | Mapping[str, Any]], name: str
) -> NDArray[np.float64]:
    """Return a number of every item; NaN, which matplotlib leaves out, where there is none."""
    values = (_get(item, name) for item in items)
    column = np.array([math.nan if v is None else float(v) for v in values], dtype=np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def _has_failed(item: StabilityMargins | Mapping[str, Any]) -> bool:
    return bool(_get(item, "failed")) or _get(item, "failure") is not None


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
    label = name if finite.size else f"{name} (without limit)"
    axes.plot(steps, values, marker=marker, markersize=3, color=_BLUE, linewidth=1.3, label=label)
    shown = np.concatenate([measured, finite])
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high > _LOG_FROM * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(min(0.0, low * 1.1), high * 1.1 if high > 0 else 1.0)
    if finite.size:
        # A limit is a setting: it holds from one measurement to the next, and then jumps.
        style = {"linestyle": "--", "color": _VERMILION, "linewidth": 1.6}
        axes.plot(steps, limits, drawstyle="steps-post", label="limit", **style)
        ceiling = np.full_like(limits, axes.get_ylim()[1])
        axes.fill_between(
            steps, limits, ceiling, step="post", color=_VERMILION, alpha=0.08, linewidth=0
        )


# -- matplotlib ------------------------------------------------------------------------------------


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("stableopt.plot needs matplotlib: pip install stableopt[plot]") from error


def _figure(figsize: tuple[float, float]) -> Any:
    figure = _import("matplotlib.figure").Figure(figsize=figsize, dpi=100, layout="constrained")
    _import("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _new_axes() -> Any:
    return _figure(figsize=(5.4, 4.2)).add_subplot()
