"""The figures of the escape experiment: runs from minima, and test accuracy against sharpness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks.framework.plotting import coloured, finish, limit, panels, points, trace
from stableopt import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["scatter", "traces"]


def traces(frame: Any, lr: float) -> Figure:
    """Draw loss, sharpness and non-uniformity against steps, and the path in their plane."""
    figure, axes = panels(4, width=3.25, height=3.8)
    loss, sharpness, non_uniformity, diagram = axes
    frame = frame[frame.random_labels == frame.random_labels.iloc[0]]
    style = {"marker": "o", "markersize": 3, "linewidth": 1}
    limit(diagram, 2 / lr)
    for method, colour in coloured(frame.how):
        run = frame[frame.how == method]
        trace(loss, run.step, run.loss, method, colour)
        trace(sharpness, run.step, run.sharpness, colour=colour, **style)
        trace(non_uniformity, run.step, run.non_uniformity, colour=colour, **style)
        trace(diagram, run.sharpness, run.non_uniformity, colour=colour, **style)
        rule, size, n = UpdateRule(lr=run.lr.iloc[0]), run.batch_size.iloc[0], run.n.iloc[0]
        limit(sharpness, y=rule.max_sharpness, colour=colour)
        if not pd.isna(size):
            for panel in (non_uniformity, diagram):
                limit(panel, y=rule.max_non_uniformity(size, n), colour=colour)
    step = "step after the switch"
    finish(loss, step, log="y", title="training loss")
    finish(sharpness, step, title="sharpness a, limits 2/η", ylim=(0, None))
    finish(non_uniformity, step, log="y", title="non-uniformity s, limits √B/η")
    settings = {"title": "where they go", "xlim": (0, None)}
    finish(diagram, "sharpness a", "non-uniformity s", **settings)
    return figure


def scatter(frame: Any, data: str) -> Figure:
    """Draw test accuracy against sharpness, a colour for each way of training."""
    figure, (axes,) = panels()
    for label, colour in coloured(frame["from"]):
        models = frame[frame["from"] == label]
        points(axes, models.sharpness, 100 * models.test_accuracy, label, colour)
    finish(axes, "sharpness a", "test accuracy, %", log="x", title=data)
    return figure
