"""Figures, by the numbers that can be read off them."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stableopt import JSONLinesSink, StabilityMargins, StabilityRegion, UpdateRule, plot
from stableopt.stability import Layers, QuantityResult

REGION = StabilityRegion(UpdateRule(lr=0.1), batch_size=4)
FULL_BATCH = StabilityRegion(UpdateRule(lr=0.1))
PATH = [(4.0, 30.0), (12.0, 22.0), (19.0, 12.0)]


def labelled(axes: Any, label: str) -> Any:
    handles, labels = axes.get_legend_handles_labels()
    return handles[labels.index(label)]


def test_the_box_and_the_half_ellipse_are_where_the_theory_has_them() -> None:
    """Catches exchanged axes, and a half-ellipse that is drawn for the box."""
    axes = plot.diagram(REGION).axes[0]
    box = labelled(axes, "limits")
    assert box.get_xydata().tolist() == [[20, 0], [20, 20], [0, 20]]
    assert box.get_linestyle() == "--"
    outline = labelled(axes, "exact in one dimension").get_paths()[0].vertices
    # On the ellipse ((a - 10) / 10)^2 + (s / 20)^2 = 1 or on its base; rounding only.
    a, s = outline.T
    on_ellipse = np.abs(((a - 10) / 10) ** 2 + (s / 20) ** 2 - 1) < 1e-9
    assert np.all(on_ellipse | (s == 0))
    assert s.max() == pytest.approx(20, rel=1e-3)  # 200 points miss the very top


def test_full_batch_is_a_vertical_line() -> None:
    """Catches infinity on an axis, and a top side where there is none."""
    figure = plot.diagram(FULL_BATCH, PATH)
    axes = figure.axes[0]
    assert set(labelled(axes, "limits").get_xdata()) == {20.0}
    assert axes.get_ylim() == pytest.approx((0, 33))
    assert np.isfinite(plot.to_rgb(figure)).all()


def test_no_limit_at_all_is_no_line() -> None:
    """Catches a learning rate of zero, without any limit, that breaks the axes."""
    axes = plot.diagram((math.inf, math.inf), PATH).axes[0]
    assert "limits" not in axes.get_legend_handles_labels()[1]
    assert axes.get_xlim() == pytest.approx((0, 20.9))


def test_only_the_box_of_a_pair_is_drawn() -> None:
    """Catches an exact region invented for a rule whose limits alone are known."""
    axes = plot.diagram((38.0, 9.0)).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["limits"]
    sides = labelled(plot.diagram((math.inf, 9.0)).axes[0], "limits").get_ydata()
    assert list(sides) == [9.0, 9.0]


def test_several_regions_have_labels_and_colours_of_their_own() -> None:
    """Catches regions that look alike."""
    axes = plot.diagram({"before": REGION, "after": FULL_BATCH}).axes[0]
    before, after = labelled(axes, "before: limits"), labelled(axes, "after: limits")
    assert before.get_color() != after.get_color()


def test_every_point_is_inside_the_axes_in_its_order() -> None:
    """Catches a trajectory cut off at the limits, exchanged ends, and times out of order."""
    history = [
        StabilityMargins(step=10 * k, sharpness=a, non_uniformity=s)
        for k, (a, s) in enumerate(PATH)
    ]
    figure = plot.diagram(REGION, [*history, StabilityMargins(step=30, failure="nan")])
    axes, bar = figure.axes
    (dots,) = [c for c in axes.collections if c.get_array() is not None]
    assert np.array_equal(dots.get_offsets(), PATH)
    assert dots.get_array().tolist() == [0, 10, 20]
    assert labelled(axes, "start").get_xydata().tolist() == [list(PATH[0])]
    assert labelled(axes, "end").get_xydata().tolist() == [list(PATH[-1])]
    assert bar.get_ylabel() == "step"
    assert axes.get_ylim()[1] > 30


def test_one_point_is_an_end() -> None:
    """Catches a colour scale without extent, at the first measurement of every run."""
    figure = plot.diagram(REGION, [(5.0, 5.0)])
    assert "start" not in figure.axes[0].get_legend_handles_labels()[1]
    assert plot.to_rgb(figure).std() > 0


def test_a_history_without_one_quantity_says_so() -> None:
    """Catches an empty diagram, as of the default quantities, that looks like a run without steps."""
    history = [StabilityMargins(step=k, sharpness=3.0) for k in range(3)]
    for points, said in ((history, ["not measured"]), ([], []), (PATH, [])):
        axes = plot.diagram(REGION, points).axes[0]
        assert [text.get_text() for text in axes.texts] == said


def test_axes_are_named_and_may_be_given() -> None:
    """Catches a figure that ignores ``ax`` and leaves a grid of panels empty."""
    figure = plot.diagram(REGION)
    assert figure.axes[0].get_xlabel().startswith("sharpness")
    assert figure.axes[0].get_ylabel().startswith("non-uniformity")
    ax = figure.add_axes((0.5, 0.5, 0.2, 0.2))
    assert plot.diagram(REGION, PATH, ax=ax, title="inset") is figure
    assert ax.get_title() == "inset"


@pytest.mark.parametrize("region", [(1.0,), (-1.0, 2.0), (math.nan, 1.0), "box"])
def test_what_is_no_region_is_refused(region: Any) -> None:
    """Catches a wrong argument that is drawn as something."""
    with pytest.raises(ValueError, match="region"):
        plot.diagram(region)


def test_what_is_no_point_is_refused() -> None:
    """Catches (step, sharpness, non-uniformity) taken for a pair."""
    with pytest.raises(ValueError, match="points"):
        plot.diagram(REGION, [(1.0, 2.0, 3.0)])


def history() -> list[StabilityMargins]:
    descent = [
        StabilityMargins(
            step=k,
            sharpness=0.1 * 2**k,
            sharpness_limit=20.0,
            non_uniformity=5.0 + k,
            non_uniformity_limit=math.inf if k < 4 else 30.0,
        )
        for k in range(8)
    ]
    return [*descent, StabilityMargins(step=8, sharpness_limit=20.0, failure="the loss is nan")]


def test_margins_show_values_limits_and_failures() -> None:
    """Catches exchanged panels, an infinite limit on the axis, and failures left out."""
    sharpness, non_uniformity = plot.margins(history(), title="run").axes
    assert labelled(sharpness, "sharpness").get_ydata()[:2].tolist() == [0.1, 0.2]
    assert labelled(sharpness, "failed").get_xdata().tolist() == [8]
    limits = labelled(non_uniformity, "limit").get_ydata()
    assert np.isnan(limits[:4]).all()
    assert limits[4:8].tolist() == [30.0] * 4
    assert (sharpness.get_yscale(), non_uniformity.get_yscale()) == ("log", "linear")
    assert sharpness.get_ylim()[1] > 20


def test_a_preconditioned_sharpness_is_drawn_with_its_limit() -> None:
    """Catches Adam's plain sharpness drawn next to a limit that is not its own."""
    run = [
        StabilityMargins(
            step=step,
            sharpness=5.0,
            preconditioned_sharpness=300.0 + step,
            preconditioned_sharpness_limit=380.0,
            non_uniformity=7.0,
        )
        for step in (1, 2, 3)
    ]
    upper, _ = plot.margins(run).axes
    assert upper.get_ylabel().startswith("preconditioned sharpness")
    lines = [np.asarray(line.get_ydata()).tolist() for line in upper.get_lines()]
    assert [301.0, 302.0, 303.0] in lines
    diagram = plot.diagram((380.0, 20.0), run).axes[0]
    (dots,) = (c for c in diagram.collections if len(c.get_offsets()) == 3)
    assert np.asarray(dots.get_offsets()).tolist() == [[301.0, 7.0], [302.0, 7.0], [303.0, 7.0]]


def test_margins_of_records_are_those_of_the_history(tmp_path: Path) -> None:
    """Catches a file of JSON lines that cannot be drawn, ``null`` limits included."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    for each in history():
        sink(each.step, each.record())
    records = [json.loads(line) for line in sink.path.read_text().splitlines()]
    drawn = plot.to_rgb(plot.margins(records))
    assert np.array_equal(drawn, plot.to_rgb(plot.margins(history())))


@pytest.mark.parametrize(
    "run",
    [
        [],
        [StabilityMargins(step=1, failure="nan")],
        [StabilityMargins(step=1, sharpness=-1.0), StabilityMargins(step=2, sharpness=0.0)],
        [StabilityMargins(step=1, sharpness=0.0, sharpness_limit=math.inf)],
    ],
)
def test_margins_of_next_to_nothing_can_be_drawn(run: list[StabilityMargins]) -> None:
    """Catches empty panels, negative values and zeros that raise or warn."""
    assert plot.to_rgb(plot.margins(run)).shape == (560, 700, 3)


def of_layers(count: int, step: int, **columns: Any) -> StabilityMargins:
    names = tuple(f"transformer.layers.{k}.attention.output" for k in range(count))
    columns = {name: tuple(values) for name, values in columns.items()}
    layers = Layers(names, (4,) * count, columns)
    return StabilityMargins(step=step, results={"sharpness": QuantityResult(1.0, layers=layers)})


@pytest.mark.parametrize("count", [1, 5, 150])
def test_layers_are_rows_that_can_be_read(count: int) -> None:
    """Catches labels on top of each other, the largest layer without a name, and upside-down rows."""
    shares = np.full(count, 0.1 / count)
    shares[count // 2] = 0.9
    figure = plot.layers([of_layers(count, 10 * t, share=shares) for t in range(4)])
    axes = figure.axes[0]
    plot.to_rgb(figure)
    labels = axes.get_yticklabels()
    named = [label.get_text() for label in labels]
    assert any(f".{count // 2}." in name for name in named)
    assert len(named) == count or 20 <= len(named) < 60
    boxes = sorted(label.get_window_extent().extents[1::2].tolist() for label in labels)
    for (_, top), (bottom, _) in itertools.pairwise(boxes):
        assert bottom >= top - 1  # in pixels
    assert figure.get_size_inches()[1] < 10
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    (mesh,) = axes.collections
    assert mesh.get_array().shape == (count, 4)


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"mean_curvature": (-1.0, 3.0)}, "mean_curvature"),
        ({"sharpness": (0.0, 5.0), "limit": (4.0, 4.0)}, "ratio"),
        ({"sharpness": (1e-9, 5.0)}, "sharpness"),
        ({"sharpness": (None, math.inf)}, "sharpness"),
        ({"share": (0.0, 0.0)}, "share"),
        ({}, "share"),
    ],
    ids=str,
)
def test_layers_of_every_kind_of_number(columns: Any, column: str) -> None:
    """Catches a logarithm of zero or below, and a map of nothing that fails."""
    history = [of_layers(2, 3, **columns), StabilityMargins(step=4, failure="nan")]
    for run in (history, history[:1] * 2, []):
        assert np.isfinite(plot.to_rgb(plot.layers(run, column, marks=[(3, "lr up")]))).all()


def test_layers_come_and_go_and_misspelt_columns_do_not() -> None:
    """Catches rows shifted by a layer that froze, and thousands of columns in one picture."""
    history = [
        of_layers(2 if t < 3 else 1, t, share=[0.5, 0.5][: 2 if t < 3 else 1]) for t in range(5)
    ]
    (mesh,) = plot.layers(history).axes[0].collections
    assert np.isnan(np.ma.filled(mesh.get_array(), np.nan)[1]).tolist() == [False] * 3 + [True] * 2
    long = [of_layers(1, t, share=[1.0]) for t in range(1200)]
    (mesh,) = plot.layers(long).axes[0].collections
    assert mesh.get_array().shape == (1, 400)
    with pytest.raises(ValueError, match=r"column='shares'.*share"):
        plot.layers(history, "shares")


def test_nothing_touches_pyplot() -> None:
    """Catches figures that pyplot keeps alive, and a backend chosen for the user."""
    code = """
import sys
from stableopt import plot
plot.to_rgb(plot.diagram((1.0, 1.0), [(0.5, 0.5), (1.0, 0.2)]))
plot.to_rgb(plot.margins([]))
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_target_widens_the_axes_and_open_ends_have_no_side() -> None:
    """Catches a target outside the picture, and infinity among its corners."""
    figure = plot.diagram((4.0, 4.0), [(3.0, 3.0)], target=((0.0, 9.0), (2.0, math.inf)))
    (axes,) = figure.axes
    assert axes.get_xlim()[1] > 9
    (box,) = [line for line in axes.lines if line.get_label() == "target"]
    x, y = map(set, box.get_data())
    assert max(x) == 9
    assert min(x) < axes.get_xlim()[0]
    assert min(y) == 2
    assert axes.get_ylim()[1] < max(y) < math.inf
    plot.to_rgb(figure)


def test_marks_lie_on_the_trajectory_where_it_was_then() -> None:
    """Catches a mark at the measurement after the decision, and one that is off the path."""
    history = [
        StabilityMargins(step=step, sharpness=float(step), non_uniformity=2.0 * step)
        for step in (10, 20, 30)
    ]
    marks = [(5, "early"), (20, "up"), (29, "up"), (99, "late")]
    figure = plot.diagram(None, history, marks=marks)
    drawn = {
        line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines
    }
    assert drawn["early"] == [(10, 20)]
    assert drawn["up"] == [(20, 40), (20, 40)]
    assert drawn["late"] == [(30, 60)]
    panels = plot.margins(history, marks=marks).axes
    assert [line.get_xdata()[0] for line in panels[1].lines if len(line.get_xdata()) == 2] == [
        5,
        20,
        29,
        99,
    ]
    # A run without measurements has nowhere to put them.
    plot.diagram(None, [], marks=marks)
