"""The pictures that the TensorBoard sink writes: diagrams and maps of layers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tensorboard_runs import adam, gd, read, sgd, steps_of, write
from torch import nn

import stableopt
from stableopt import StabilityMargins, StabilityRegion, TensorBoardSink, UpdateRule, plot
from stableopt.sinks import Measured
from stableopt.stability import Layers
from stableopt.stability.measure.measurement import QuantityResult


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_no_more_diagrams_than_asked_for(tmp_path: Path, most: int, count: int) -> None:
    """Catches one diagram too many, and a run whose end has none."""
    events = write(tmp_path, map(sgd, range(1, count + 1)), max_diagrams=most)
    if most == 0:
        assert events.Tags()["images"] == []
        return
    steps = [event.step for event in events.Images("stability/diagram")]
    assert len(steps) == len(set(steps)) <= most
    assert steps[-1] == count


def test_diagrams_get_rarer(tmp_path: Path) -> None:
    """Catches diagrams of the first measurements only, and none of the rest of the run."""
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 961):
        # Only measured pairs count.
        sink(step, sgd(step).record() if step % 2 == 0 else {"sharpness": 1.0})
    sink.flush()
    sink.flush()
    sink.close()
    steps = [event.step for event in read(tmp_path).Images("stability/diagram")]
    # The powers of 1000^(1/8), and the last measurement.
    assert [step // 2 for step in steps] == [1, 2, 6, 13, 32, 75, 178, 422, 480]


def test_a_program_that_closes_nothing_has_the_last_diagram(tmp_path: Path) -> None:
    """Catches a program that ends without the last diagram, or writes to a closed writer."""
    with mock.patch("atexit.register") as register:
        sink = TensorBoardSink(tmp_path)
        for step in range(1, 6):
            sink(step, sgd(step).record())
        (at_exit,) = {call.args[0] for call in register.call_args_list}
        at_exit()
        assert [event.step for event in read(tmp_path).Images("stability/diagram")][-1] == 5
        sink(6, sgd(6).record())
        sink.writer.close()
        files = sorted(tmp_path.iterdir())
        at_exit()
    assert sorted(tmp_path.iterdir()) == files


def test_diagrams_are_pictures(tmp_path: Path) -> None:
    """Catches pixels in the wrong order of axes, which tensorboard stores all the same."""
    (image,) = write(tmp_path, [sgd(3)]).Images("stability/diagram")
    assert (image.step, image.width, image.height) == (3, 540, 420)


@pytest.mark.parametrize("count", [3, 17, 24])
def test_many_layers_are_few_scalars(count: int, tmp_path: Path) -> None:
    """Catches 150 layers that flood the page, scalars that come and go, and maps at each measurement."""
    deep = [f"blocks.{k}.{part}" for k in range(-(-count // 2)) for part in ("attn", "mlp")]
    names = tuple(["embed", *deep][:count]) if count < 24 else tuple(f"l{k}x" for k in range(count))
    sink = TensorBoardSink(tmp_path, max_diagrams=2)
    for step in (1, 2, 3):
        shares = tuple((k + step) % count / count for k in range(count))
        columns = {"share": shares, "sharpness": (2.0,) * count, "limit": (4.0,) * count}
        result = QuantityResult(1.0, layers=Layers(names, (2,) * count, columns))
        sink.receive(Measured(step, StabilityMargins(step=step, results={"sharpness": result})))
    sink.close()
    events = read(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if "layers" in tag]
    assert len(tags) == 2 * {3: 3, 17: 3, 24: 16}[count]
    assert all(steps_of(events, tag) == [1, 2, 3] for tag in tags)
    if count < 24:
        assert events.Scalars("stability_layers_share/embed")[0].value == pytest.approx(1 / count)
        assert events.Scalars("stability_layers_ratio/embed")[0].value == 0.5
    for column in ("share", "ratio"):
        assert [i.step for i in events.Images(f"stability/layers_{column}")] == [1, 3]


@pytest.mark.parametrize(
    ("margins", "box"),
    [
        (sgd(1), (20.0, 20.0)),
        (sgd(1, sharpness_limit=38.0), (38.0, 20.0)),
        (gd(1), (20.0, math.inf)),
        (adam(1), (380.0, 20.0)),
        (sgd(1, sharpness_limit=-1.0), None),
    ],
    ids=["sgd", "momentum", "gd", "adam", "without"],
)
def test_a_record_alone_shows_its_limits(tmp_path: Path, margins: Any, box: Any) -> None:
    """Catches an update rule guessed from a record, which has limits but no rule."""
    sink = TensorBoardSink(tmp_path)
    sink(margins.step, margins.record())
    assert sink._diagrams._region == box
    sink.close()


OPTIMIZERS: dict[str, Any] = {
    "plain SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.2),
    "GD": partial(stableopt.GD, lr=0.1),
    "strong decay": partial(torch.optim.SGD, lr=0.1, weight_decay=30.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_boundary_is_that_of_the_optimizers_own_rule(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the half-ellipse of plain SGD, or a bare box, drawn for another rule.

    What matplotlib is given to draw is compared with :class:`StabilityRegion` of the rule.
    """
    figures: list[Any] = []
    to_rgb = plot.to_rgb
    monkeypatch.setattr(plot, "to_rgb", lambda figure: to_rgb(figures.append(figure) or figure))
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
    optimizer = OPTIMIZERS[name](model.parameters())
    sink = TensorBoardSink(tmp_path)
    monitor = stableopt.StabilityMonitor(
        optimizer,
        model,
        nn.MSELoss(),
        (x, y),
        every=1,
        batch_size=4,
        quantities=("sharpness", "non_uniformity"),
        sinks=[sink],
    )
    nn.MSELoss()(model(x), y).backward()
    optimizer.step()
    sink.close()

    rule, margins = UpdateRule.from_optimizer(optimizer), monitor.margins
    full_batch = name == "GD"
    assert margins is not None
    region = StabilityRegion(rule, 8 if full_batch else 4, 8)
    (axes,) = (ax for figure in figures for ax in figure.axes if "sharpness" in ax.get_xlabel())
    (filled,) = axes.collections[:1]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    prefix = "preconditioned " if name == "AdamW" else ""
    assert axes.get_xlabel().startswith(f"{prefix}sharpness")
    right, top = region.max_sharpness, region.max_non_uniformity
    limits = [margins.preconditioned_sharpness_limit, margins.sharpness_limit]
    assert next(limit for limit in limits if limit is not None) == right
    assert margins.non_uniformity_limit == top
    if full_batch:
        assert lines["limits"].tolist() == [[right, 0], [right, axes.get_ylim()[1]]]
        return
    assert lines["limits"].tolist() == [[right, 0], [right, top], [region.min_sharpness, top]]
    outline = filled.get_paths()[0].vertices
    boundary = region.boundary(kind="exact")
    # The polygon goes along the boundary, and back along the axis.
    drawn = outline[(outline[:, 1] > 0) & (outline[:, 0] > boundary[0, 0])]
    inner = boundary[(boundary[:, 1] > 0) & (boundary[:, 0] > boundary[0, 0])]
    assert {*map(tuple, drawn)} == {*map(tuple, inner)}
    ellipse = StabilityRegion(UpdateRule(lr=rule.lr), 4, 8).boundary(kind="exact")
    assert (name == "plain SGD") == (boundary.tolist() == ellipse.tolist())
