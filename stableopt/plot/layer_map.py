"""`layers`: a heat map of the layers over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stableopt.plot.canvas import GREY, VERMILION, figure_of, imported
from stableopt.stability import StabilityMargins
from stableopt.stability.layers.table import COLUMNS, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["layers"]

_TITLES = {
    "share": "share of the top eigenvector",
    "sharpness": r"$\lambda_{\max}(P_bH_{bb})$",
    "ratio": "sharpness of the layer / limit",
    "mean_curvature": "tr(H) / number of parameters",
    "non_uniformity": "non-uniformity of the layer",
}

_LOG_FROM = 20.0
"""Ratio of the largest to the smallest number from which colours are logarithmic."""

_DECADES = 4
"""Decades that logarithmic colours span at most: what is smaller is as dark as can be."""

_ROW, _TALLEST = 0.21, 8.0
"""Height of a row with a label, and of the map with the most rows, in inches."""

_FEW = 12
"""Layers up to which a linear scale shows their shares."""

_MOST_COLUMNS = 500
"""Measurements shown, evenly over the run: more are finer than pixels."""


def layers(
    history: Iterable[StabilityMargins | Mapping[str, Any]],
    column: str = "share",
    *,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw one number of each layer over the steps, the first layer at the top.

    Layers are in the order of the model. Where there are too many for a label each, those with the
    largest values have one. Colours are logarithmic where numbers are positive and span more than a
    factor of 20, and where some are negative. A ratio above 1 is orange, what was not measured grey.

    Args:
        history: a monitor's ``history``, or records with their ``step``, such as the lines that
            :class:`~stableopt.JSONLinesSink` wrote.
        column: ``"share"``, which comes with each sharpness, or with the quantity ``"layers"`` any of
            ``"sharpness"``, ``"ratio"``, ``"mean_curvature"`` and ``"non_uniformity"``.
        marks: pairs (step, label) of changes during the run, drawn as vertical lines.
        title: a title, or ``None``.
        ax: axes to draw into; a new figure's by default.

    Raises:
        ImportError: without matplotlib.
        ValueError: for another column.

    >>> from stableopt.stability import Layers, QuantityResult
    >>> known = Layers(("embed", "head"), (4, 2), {"share": (0.25, 0.75)})
    >>> history = [StabilityMargins(step=t, results={"sharpness": QuantityResult(1.0, layers=known)})
    ...            for t in range(3)]
    >>> [label.get_text() for label in layers(history).axes[0].get_yticklabels()]
    ['embed', 'head']
    """
    if column not in (*COLUMNS, "ratio"):
        raise ValueError(f"column={column!r}: expected one of {', '.join((*COLUMNS, 'ratio'))}")
    steps, names, table = _table(history, column)
    height = min(max(_ROW * len(names), 1.7), _TALLEST)
    axes: Any = figure_of((7.0, height + 1.1)).add_subplot() if ax is None else ax
    figure: Figure = axes.get_figure()
    if table.size:
        _draw(axes, steps, names, table, column)
        for step, label in marks:
            axes.axvline(step, color="white", linewidth=1.0, linestyle=":")
            inside = {"textcoords": "offset points", "rotation": 90, "va": "bottom"}
            where = {"xycoords": ("data", "axes fraction"), "xytext": (3, 3), **inside}
            axes.annotate(label, (step, 0.0), color="white", fontsize=7, **where)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xlabel("step")
    if title is not None:
        axes.set_title(title)
    return figure


def _table(
    history: Iterable[StabilityMargins | Mapping[str, Any]], column: str
) -> tuple[NDArray[np.float64], list[str], NDArray[np.float64]]:
    """Return steps ``(t,)``, names, and the numbers ``(layers, t)``, NaN where there is none."""
    rows = [(step, values) for step, values in (_row(item, column) for item in history) if values]
    rows = rows[:: -(-len(rows) // _MOST_COLUMNS) or 1]
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    table = np.array([[_number(values.get(name)) for _, values in rows] for name in names])
    return np.array([step for step, _ in rows], dtype=np.float64), names, table


def _row(
    item: StabilityMargins | Mapping[str, Any], column: str
) -> tuple[float, dict[str, float | None]]:
    if isinstance(item, StabilityMargins):
        known = item.layers
        return item.step, {} if known is None else dict(
            zip(known.names, known.column(column), strict=True)
        )
    by_layer: Mapping[str, Any] = item.get("by_layer") or {}
    return item.get("step", math.nan), {name: of.get(column) for name, of in by_layer.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _draw(
    axes: Any,
    steps: NDArray[np.float64],
    names: Sequence[str],
    table: NDArray[np.float64],
    column: str,
) -> None:
    colours, norm = _colours(table, column)
    table = np.maximum(
        table, norm.vmin
    )  # which leaves NaN, and shows a zero on a logarithmic scale
    middles = (steps[1:] + steps[:-1]) / 2
    ends = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    edges = np.concatenate([ends[:1], middles, ends[1:]])
    rows = np.arange(len(names) + 1) - 0.5
    # Rasterised, a map of 150 layers is small in a vector format as well.
    image = axes.pcolormesh(edges, rows, table, cmap=colours, norm=norm, rasterized=True)
    axes.set_facecolor("#DDDDDD")
    axes.invert_yaxis()
    figure = axes.get_figure()
    over = "max" if column == "ratio" and np.nanmax(table) > 1 else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend=over)
    bar.set_label(_TITLES.get(column, column.replace("_", " ")), fontsize="small")
    inches = axes.get_position().height * figure.get_size_inches()[1]
    labelled = _labelled(table, max(int(inches / _ROW * 1.5), 1))
    small = 7 if len(labelled) > 12 or len(names) > 20 else 9
    axes.set_yticks(labelled, [shortened(names[at], 34) for at in labelled], fontsize=small)
    axes.tick_params(axis="y", length=2)


def _labelled(table: NDArray[np.float64], most: int) -> list[int]:
    """Return the rows that have labels: all, or those with the largest values, not too close."""
    count = len(table)
    if count <= most:
        return list(range(count))
    apart = count / most
    peaks = np.where(np.isnan(table), -np.inf, table).max(axis=1)
    chosen: list[int] = []
    for row in np.argsort(-peaks, kind="stable"):
        if all(abs(int(row) - other) >= apart for other in chosen):
            chosen.append(int(row))
    return sorted(chosen)


def _colours(table: NDArray[np.float64], column: str) -> tuple[Any, Any]:
    """Return the colour map and its norm."""
    scales = imported("matplotlib.colors")
    known = table[np.isfinite(table)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low < 0:
        size = max(-low, high)
        norm = scales.SymLogNorm(size / 100, vmin=-size, vmax=size)
        return imported("matplotlib").colormaps["PuOr_r"], norm
    colours = imported("matplotlib").colormaps["viridis"]
    if column == "ratio" and high > 1:
        colours, high = colours.with_extremes(over=VERMILION), 1.0
    positive = known[known > 0]
    if positive.size and column != "share" and high > _LOG_FROM * positive.min():
        least = max(float(positive.min()), high / 10**_DECADES)
        return colours, scales.LogNorm(least, high, clip=False)
    if column == "share" and len(table) > _FEW:
        # Most of many layers hold little: a root of the share sets them apart.
        return colours, scales.PowerNorm(0.5, 0.0, high or 1.0)
    return colours, scales.Normalize(0.0, high or 1.0)
