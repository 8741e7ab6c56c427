"""`margins`: the figure of each quantity with its limit over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stableopt.plot.canvas import (
    BLUE,
    GREY,
    VERMILION,
    chart_of,
    figure_of,
    finish,
    spans_decades,
)
from stableopt.stability import QUANTITIES, StabilityMargins

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["margins"]


def margins(
    history: Iterable[StabilityMargins | Mapping[str, Any]],
    *,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
) -> Figure:
    """Draw sharpness and non-uniformity over the steps, each with its limit.

    With a preconditioner the sharpness is the preconditioned one, to which the limit applies. Panels of
    other measured quantities with a chart follow below. The range above a limit is shaded. Failed
    measurements are crosses at the bottom of a panel. An axis that spans more than a factor of 20 is
    logarithmic if all its numbers are positive.

    Args:
        history: a monitor's ``history``, or records with their ``step``, such as the lines of a
            :class:`~stableopt.JSONLinesSink`.
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
    names = _drawn_names(records)
    figure: Figure = figure_of(figsize=(7.0, 2.8 * len(names)))
    panels = figure.subplots(len(names), 1, sharex=True)
    for axes, name in zip(panels, names, strict=True):
        values, limits = _column(records, name), _column(records, f"{name}_limit")
        _draw_panel(axes, steps, values, limits, name)
        if failed.any():
            transform, bottom = axes.get_xaxis_transform(), np.full(failed.sum(), 0.03)
            style = {"color": GREY, "label": "failed", "transform": transform}
            axes.plot(steps[failed], bottom, "x", **style)
        for index, label in enumerate(dict.fromkeys(label for _, label in changes)):
            line = {"color": GREY, "linestyle": (0, (1 + 2 * index, 2)), "linewidth": 0.8}
            for step, step_label in changes:
                if step_label == label:
                    axes.axvline(step, **line)
            axes.plot([], [], label=label, **line)
        axes.set_ylabel(chart_of(name).label)
        finish(axes)
    panels[-1].set_xlabel("step")
    if title is not None:
        figure.suptitle(title)
    return figure


def _record(margins: StabilityMargins) -> dict[str, float]:
    return {"step": margins.step, **margins.record()}


def _drawn_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the quantities to draw: sharpness and non-uniformity, then other measured ones."""
    charted = [name for name, quantity in QUANTITIES.items() if quantity.chart is not None]
    measured = [name for name in charted if np.isfinite(_column(records, name)).any()]
    preconditioned = "preconditioned_sharpness"
    box = [preconditioned if preconditioned in measured else "sharpness", "non_uniformity"]
    return box + [name for name in measured if name not in (*box, "sharpness")]


def _column(records: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """Return a number of every record; NaN, which matplotlib does not draw, for a missing one."""
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
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
        return
    finite = limits[np.isfinite(limits)]
    marker = "o" if measured.size < 60 else ""
    title = chart_of(name).title
    label = title if finite.size else f"{title} (without limit)"
    axes.plot(steps, values, marker=marker, markersize=3, color=BLUE, linewidth=1.3, label=label)
    drawn = np.concatenate([measured, finite])
    low, high = float(drawn.min()), float(drawn.max())
    if spans_decades(low, high):
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
    else:
        axes.set_ylim(min(0.0, low * 1.1), high * 1.1 if high > 0 else 1.0)
    if finite.size:
        # A limit depends on the optimizer's settings, which change in jumps.
        style = {"linestyle": "--", "color": VERMILION, "linewidth": 1.6}
        axes.plot(steps, limits, drawstyle="steps-post", label="limit", **style)
        ceiling = np.full_like(limits, axes.get_ylim()[1])
        axes.fill_between(
            steps, limits, ceiling, step="post", color=VERMILION, alpha=0.08, linewidth=0
        )
