"""The plotting vocabulary: what is drawn, once, and how it is labelled."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.framework.plotting import (
    PALETTE,
    coloured,
    finish,
    limit,
    panels,
    points,
    trace,
)
from benchmarks.framework.tables import table


def test_missing_values_are_left_out() -> None:
    """Catches a missing value drawn as a number, one that breaks a trace in two, and a nullable
    column that matplotlib cannot draw.
    """
    content = table({"B": size, "a": a} for size, a in ((1, 0.5), (None, 1.0), (4, None), (8, 2.0)))
    _, (axes,) = panels()
    points(axes, content.B, content.a, "here")
    trace(axes, pd.Series([1, 2, 3, 4]), content.a)
    assert np.isnan(axes.lines[0].get_xdata()[1])
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [0.5, 1.0, 2.0])


def test_a_limit_is_drawn_once() -> None:
    """Catches a limit drawn once for each run, and an x limit skipped for having a y limit's value."""
    _, (axes,) = panels()
    for value in (2.0, 2.0, 3.0):
        limit(axes, y=value)
    limit(axes, x=2.0)
    limit(axes, [1, 2], [3, 4], "bound")
    assert len(axes.lines) == 4
    assert {line.get_linestyle() for line in axes.lines} == {"--"}


def test_rows_of_panels() -> None:
    """Catches panels ordered by columns, and a figure with the height of one row."""
    figure, axes = panels(3, rows=2, width=2.0, height=1.5)
    assert [panel.get_subplotspec().num1 for panel in axes] == list(range(6))
    assert figure.get_size_inches().tolist() == [6.0, 3.0]


def test_panels_are_labelled() -> None:
    """Catches a scale that is not set, a legend of nothing, and labels on the wrong axis."""
    figure, (left, right) = panels(2, title="both")
    points(left, [1.0, 4.0], [1.0, 2.0], "here")
    points(right, [1.0], [1.0])
    finish(left, "step", "loss", log="y", ylim=(0.5, 4))
    finish(right, "step")
    assert figure.get_suptitle() == "both"
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "loss")
    assert (left.get_xscale(), left.get_yscale()) == ("linear", "log")
    assert left.get_ylim() == (0.5, 4)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["here"]
    assert right.get_legend() is None


def test_colours_go_by_name() -> None:
    """Catches one name in two colours, and more names than colours."""
    assert list(coloured(["GD", "SGD", "GD"])) == [("GD", PALETTE[0]), ("SGD", PALETTE[1])]
    assert len(list(coloured(range(20)))) == 20


def test_ticks_are_the_only_labels() -> None:
    """Catches powers of ten between batch sizes, and ticks that a logarithmic axis replaces."""
    _, (axes,) = panels()
    points(axes, [1, 4, 16], [1.0, 2.0, 3.0])
    finish(axes, log="x", ticks=(1, 4, 16))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
    assert list(axes.get_xticks(minor=True)) == []
