"""`layers`: a heat map of the layers over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stableopt.plot.canvas import GREY, VERMILION, figure_of, imported, spans_decades
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

_DECADES = 4
"""Largest number of decades of logarithmic colours; smaller values have the darkest colour."""

_ROW, _TALLEST = 0.21, 8.0
"""Height of a row with a label, and largest height of the map, in inches."""

_LINEAR_SCALE_LAYERS = 12
"""Largest number of layers whose shares have linear colours."""

_MOST_COLUMNS = 500
"""Largest number of measurements, spread evenly over the run; more are finer than pixels."""


def layers(
    history: Iterable[StabilityMargins | Mapping[str, Any]],
    column: str = "share",
    *,
    marks: Iterable[tuple[float, str]] = (),
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw one number of each layer over the steps, the first layer at the top.

    Layers are in the order of the model. If there are too many to label all, those with the largest
    values are labelled. Colours are logarithmic if the numbers are positive and span more than a factor
    of 20, or if some are negative. A ratio above 1 is orange, and a missing measurement grey.

    Args:
        history: a monitor's ``history``, or records with their ``step``, such as the lines of a
            :class:`~stableopt.JSONLinesSink`.
        column: ``"share"``, which every measured sharpness has; or one of ``"sharpness"``, ``"ratio"``,
            ``"mean_curvature"`` and ``"non_uniformity"``, which the quantity ``"layers"`` has.
        marks: pairs (step, label) of changes during the run, drawn as vertical lines.
        title: a title, or ``None``.
        ax: axes to draw into; a new figure's by default.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an unknown column.

    >>> from stableopt.stability import Layers, QuantityResult
    >>> shares = Layers(("embed", "head"), (4, 2), {"share": (0.25, 0.75)})
    >>> history = [StabilityMargins(step=t, results={"sharpness": QuantityResult(1.0, layers=shares)})
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
    """Return steps ``(t,)``, names, and the numbers ``(layers, t)``, NaN for missing ones."""
    measured = [_step_and_values(item, column) for item in history]
    measured = [(step, values) for step, values in measured if values]
    measured = measured[:: -(-len(measured) // _MOST_COLUMNS) or 1]
    names = list(dict.fromkeys(name for _, values in measured for name in values))
    table = np.array([[_number(values.get(name)) for _, values in measured] for name in names])
    return np.array([step for step, _ in measured], dtype=np.float64), names, table


def _step_and_values(
    item: StabilityMargins | Mapping[str, Any], column: str
) -> tuple[float, dict[str, float | None]]:
    """Return the step of a measurement, and the number of each layer."""
    if isinstance(item, StabilityMargins):
        layers = item.layers
        if layers is None:
            return item.step, {}
        return item.step, dict(zip(layers.names, layers.column(column), strict=True))
    by_layer: Mapping[str, Any] = item.get("by_layer") or {}
    values = {name: numbers.get(column) for name, numbers in by_layer.items()}
    return item.get("step", math.nan), values


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
    # On a logarithmic scale zero becomes the smallest colour; NaN stays NaN.
    table = np.maximum(table, norm.vmin)
    middles = (steps[1:] + steps[:-1]) / 2
    ends = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    edges = np.concatenate([ends[:1], middles, ends[1:]])
    rows = np.arange(len(names) + 1) - 0.5
    # Rasterised, since a vector format of 150 layers is large.
    image = axes.pcolormesh(edges, rows, table, cmap=colours, norm=norm, rasterized=True)
    axes.set_facecolor("#DDDDDD")
    axes.invert_yaxis()
    figure = axes.get_figure()
    extend = "max" if column == "ratio" and np.nanmax(table) > 1 else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend=extend)
    bar.set_label(_TITLES.get(column, column.replace("_", " ")), fontsize="small")
    inches = axes.get_position().height * figure.get_size_inches()[1]
    labelled = _labelled_rows(table, max(int(inches / _ROW * 1.5), 1))
    fontsize = 7 if len(labelled) > 12 or len(names) > 20 else 9
    axes.set_yticks(labelled, [shortened(names[row], 34) for row in labelled], fontsize=fontsize)
    axes.tick_params(axis="y", length=2)


def _labelled_rows(table: NDArray[np.float64], most: int) -> list[int]:
    """Return the rows to label: all, or those with the largest values at a minimum distance."""
    count = len(table)
    if count <= most:
        return list(range(count))
    distance = count / most
    peaks = np.where(np.isnan(table), -np.inf, table).max(axis=1)
    chosen: list[int] = []
    for row in np.argsort(-peaks, kind="stable"):
        if all(abs(int(row) - other) >= distance for other in chosen):
            chosen.append(int(row))
    return sorted(chosen)


def _colours(table: NDArray[np.float64], column: str) -> tuple[Any, Any]:
    """Return the colour map and its norm."""
    scales = imported("matplotlib.colors")
    finite = table[np.isfinite(table)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0:
        size = max(-low, high)
        norm = scales.SymLogNorm(size / 100, vmin=-size, vmax=size)
        return imported("matplotlib").colormaps["PuOr_r"], norm
    colours = imported("matplotlib").colormaps["viridis"]
    if column == "ratio" and high > 1:
        colours, high = colours.with_extremes(over=VERMILION), 1.0
    positive = finite[finite > 0]
    if positive.size and column != "share" and spans_decades(float(positive.min()), high):
        lowest = max(float(positive.min()), high / 10**_DECADES)
        return colours, scales.LogNorm(lowest, high, clip=False)
    if column == "share" and len(table) > _LINEAR_SCALE_LAYERS:
        # With many layers most shares are small; the square root spreads their colours.
        return colours, scales.PowerNorm(0.5, 0.0, high or 1.0)
    return colours, scales.Normalize(0.0, high or 1.0)
