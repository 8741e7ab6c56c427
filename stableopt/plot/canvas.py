"""Common parts of all figures: colours, figures without pyplot, and the import of matplotlib."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stableopt.stability import QUANTITIES, Chart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "chart_of",
    "figure_of",
    "finish",
    "imported",
    "require_matplotlib",
    "spans_decades",
    "to_rgb",
]

# Okabe and Ito's palette, distinct under every common colour blindness.
VERMILION, BLUE, GREEN, PURPLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
GREY = "#555555"

LOG_FROM = 20.0
"""Ratio of the largest to the smallest number from which axes and colours are logarithmic."""


def to_rgb(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels of ``figure``, ``(height, width, 3)``.

    >>> from stableopt.plot import diagram
    >>> to_rgb(diagram((20.0, 20.0))).shape
    (420, 540, 3)
    """
    backend = imported("matplotlib.backends.backend_agg")
    canvas = backend.FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def require_matplotlib() -> None:
    """Raise an ``ImportError`` with the install command if matplotlib is missing."""
    imported("matplotlib.figure")


def chart_of(name: str) -> Chart:
    """Return the chart of a quantity, which must have one."""
    chart = QUANTITIES[name].chart
    assert chart is not None
    return chart


def spans_decades(low: float, high: float) -> bool:
    """Return whether positive numbers from ``low`` to ``high`` need a logarithmic axis.

    >>> spans_decades(0.1, 3.0), spans_decades(1.0, 3.0), spans_decades(0.0, 3.0)
    (True, False, False)
    """
    return 0 < LOG_FROM * low < high


def finish(axes: Any) -> None:
    """Add the grid, and a legend if anything has a label."""
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", framealpha=0.9, fontsize="small")


def imported(name: str) -> Any:
    """Return a module of matplotlib, or raise an ``ImportError`` with the install command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("stableopt.plot needs matplotlib: pip install stableopt[plot]") from error


def figure_of(figsize: tuple[float, float]) -> Any:
    """Return a figure of ``figsize`` inches without pyplot."""
    figure = imported("matplotlib.figure").Figure(figsize=figsize, dpi=100, layout="constrained")
    imported("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure
