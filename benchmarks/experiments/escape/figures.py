"""The figures of the escape experiment: runs from minima, and test accuracy against sharpness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks.framework.plotting import coloured, finish, limit, panels, points, trace
from stableopt import UpdateRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["scatter", "traces"]


def traces(its: Any, lr: float) -> Figure:
    """Draw loss, sharpness and non-uniformity after the switch, and the path in the diagram."""
    figure, axes = panels(4, width=3.25, height=3.8)
    loss, sharpness, non_uniformity, diagram = axes
    its = its[its.random_labels == its.random_labels.iloc[0]]
    style = {"marker": "o", "markersize": 3, "linewidth": 1}
    limit(diagram, 2 / lr)
    for how, colour in coloured(its.how):
        run = its[its.how == how]
        trace(loss, run.step, run.loss, how, colour)
        trace(sharpness, run.step, run.sharpness, colour=colour, **style)
        trace(non_uniformity, run.step, run.non_uniformity, colour=colour, **style)
        trace(diagram, run.sharpness, run.non_uniformity, colour=colour, **style)
        rule, size, n = UpdateRule(lr=run.lr.iloc[0]), run.batch_size.iloc[0], run.n.iloc[0]
        limit(sharpness, y=rule.max_sharpness, colour=colour)
        if not pd.isna(size):
            for each in (non_uniformity, diagram):
                limit(each, y=rule.max_non_uniformity(size, n), colour=colour)
    step = "step after the switch"
    finish(loss, step, log="y", title="training loss")
    finish(sharpness, step, title="sharpness a, limits 2/η", ylim=(0, None))
    finish(non_uniformity, step, log="y", title="non-uniformity s, limits √B/η")
    where = {"title": "where they go", "xlim": (0, None)}
    finish(diagram, "sharpness a", "non-uniformity s", **where)
    return figure


def scatter(its: Any, data: str) -> Figure:
    """Draw test accuracy against sharpness, a colour for each way of training."""
    figure, (axes,) = panels()
    for label, colour in coloured(its["from"]):
        known = its[its["from"] == label]
        points(axes, known.sharpness, 100 * known.test_accuracy, label, colour)
    finish(axes, "sharpness a", "test accuracy, %", log="x", title=data)
    return figure
