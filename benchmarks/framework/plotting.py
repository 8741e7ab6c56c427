"""What several figures need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

__all__ = ["plain_log"]


def plain_log(*axes: Axis) -> None:
    """Label logarithmic axes at 1, 2, 5 times powers of ten, by plain numbers.

    matplotlib's own labels of less than a decade, 3 x 10^-1 beside 4 x 10^-1, run into each other.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
