"""`spectrum`: the figure of a spectral density, its largest eigenvalues and their limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stableopt.curvature import SpectralDensity
from stableopt.plot.canvas import BLUE, VERMILION, figure_of, finish
from stableopt.stability import StabilityMargins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["spectrum"]

_POINTS = 1000
"""Points of the curve."""


def spectrum(
    of: StabilityMargins | SpectralDensity,
    *,
    name: str = "spectrum",
    limit: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the density of eigenvalues on a logarithmic axis, down to that of a single eigenvalue.

    Args:
        of: a density, or margins with the quantity ``"spectrum"``. If the margins have
            ``"top_eigenvalues"``, these are drawn as marks, and their limit as a line.
        name: the spectrum of the margins to draw, such as ``"sigma_spectrum"``.
        limit: the largest stable eigenvalue; by default the limit in the margins.
        title: a title, or ``None``.
        ax: axes to draw into; a new figure's by default.

    Raises:
        ImportError: without matplotlib.
        ValueError: for margins without that spectrum, and a spectrum of a single value.

    >>> density = SpectralDensity((0.0, 4.0), (0.75, 0.25), width=0.5, size=8, products=2)
    >>> spectrum(density, limit=5.0).axes[0].get_ylabel()
    'density'
    """
    values: list[float] = []
    if isinstance(of, StabilityMargins):
        density, top = of[name].density, of[name.replace("spectrum", "top_eigenvalues")]
        if density is None:
            raise ValueError(f"of: margins without a density of {name!r}: measure this quantity")
        if top.value is not None:
            numbered = sorted((int(n), v) for n, v in top.details.items() if n.isdigit())
            values = [top.value, *(value for _, value in numbered)]
        limit = top.limit if limit is None else limit
    else:
        density = of
    axes: Any = figure_of((6.4, 3.6)).add_subplot() if ax is None else ax
    figure: Figure = axes.get_figure()
    low, high = density.nodes[0] - 4 * density.width, density.nodes[-1] + 4 * density.width
    grid = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu")
    curve = density.density(grid).numpy()
    # The axis ends at a tenth of the peak of a single eigenvalue.
    peak_of_one = 1 / (density.size * density.width * math.sqrt(2 * math.pi))
    floor = max(peak_of_one / 10, 1e-9 * float(curve.max()))
    axes.fill_between(grid, floor, np.maximum(curve, floor), color=BLUE, alpha=0.25, linewidth=0)
    axes.plot(grid, curve, color=BLUE, linewidth=1.3)
    axes.set_yscale("log")
    axes.set_ylim(floor, 2 * float(curve.max()))
    if values:
        style = {"linestyle": "none", "color": "black", "transform": axes.get_xaxis_transform()}
        axes.plot(values, [0.02] * len(values), "|", markersize=11, label="largest", **style)
    if limit is not None and math.isfinite(limit):
        axes.axvline(limit, color=VERMILION, linestyle="--", linewidth=1.6, label="limit")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    if title is not None:
        axes.set_title(title)
    finish(axes)
    return figure
