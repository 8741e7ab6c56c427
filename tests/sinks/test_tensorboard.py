"""The TensorBoard sink, by what TensorBoard reads back."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard_runs import adam, failed, gd, layout_of, read, series_of, sgd, steps_of, write
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import stableopt
from stableopt import StabilityMargins, TensorBoardSink
from stableopt.sinks import Decided
from stableopt.stability.measure.measurement import QuantityResult
from stableopt.stability.measure.registry import QUANTITIES, Chart, Quantity, register
from stableopt.steering import Decision


def adam_alone(step: int) -> StabilityMargins:
    return adam(step, non_uniformity=None)


TWO_PHASES = [
    *(gd(step) for step in range(1, 6)),
    failed(6),
    *(sgd(step) for step in range(7, 12)),
    gd(12, sharpness_limit=math.inf),  # a learning rate of zero
]


def test_value_lower_and_upper_have_the_same_steps(tmp_path: Path) -> None:
    """Catches a band without a value at one step: TensorBoard then shows an error."""
    events = write(tmp_path, [*TWO_PHASES, *map(adam_alone, (20, 21))], max_diagrams=0)
    charts = series_of(events)
    assert len(charts) == 6
    for title, (value, lower, upper) in charts.items():
        steps = steps_of(events, value)
        assert steps == steps_of(events, lower) == steps_of(events, upper), title
        expected = {
            "non": [*range(7, 12)],
            "sha": [*range(1, 6), *range(7, 12)],
            "pre": [20, 21],
        }[title[:3]]
        assert steps == expected, title


def test_every_number_is_finite_and_every_band_positive(tmp_path: Path) -> None:
    """Catches numbers that float32 or the dashboard turns into infinity, NaN or zero."""
    run = [
        *TWO_PHASES,
        sgd(13, sharpness=math.nan, non_uniformity=math.inf),
        sgd(14, sharpness_limit=0.0, non_uniformity_limit=-1.0),
        sgd(15, sharpness_limit=1e-45, non_uniformity_limit=1e300),
        sgd(16, sharpness=1e30, sharpness_limit=1e-30),
        sgd(17, sharpness=1e300),
        adam(18),
        adam(19, preconditioned_sharpness=math.inf),
        adam(20, preconditioned_sharpness_limit=math.inf),
    ]
    events = write(tmp_path, run, max_diagrams=0)
    for tag in events.Tags()["scalars"]:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for title, (value, lower, upper) in series_of(events).items():
        low, high = events.Scalars(lower), events.Scalars(upper)
        assert all(0 < a.value < b.value for a, b in zip(low, high, strict=True))
        # The non-uniformity of the last five is as it should be.
        broken = {"non": {13, 14, 15}, "pre": {*range(18)} | {19, 20}}
        assert not broken.get(title[:3], {*range(13, 21)}) & {*steps_of(events, value)}, title


def test_bands_lie_one_percent_about_one_and_about_the_limit(tmp_path: Path) -> None:
    """Catches a band around the value instead of the limit, and tags that are swapped."""
    run = [sgd(5, sharpness_limit=40.0), adam(6)]
    events = write(tmp_path, run, max_diagrams=0)
    shown = {
        title: [events.Scalars(tag)[0].value for tag in tags]
        for title, tags in series_of(events).items()
    }
    # float32 has seven digits.
    assert shown["sharpness / limit"] == pytest.approx([18.05 / 40, 0.99, 1.01], rel=1e-6)
    assert shown["sharpness and its limit"] == pytest.approx([18.05, 39.6, 40.4], rel=1e-6)
    name = "preconditioned sharpness"
    assert shown[f"{name} / limit"] == pytest.approx([306 / 380, 0.99, 1.01], rel=1e-6)
    assert shown[f"{name} and its limit"] == pytest.approx([306, 376.2, 383.8], rel=1e-6)
    assert shown["non-uniformity / limit"] == pytest.approx([30.05 / 20, 0.99, 1.01], rel=1e-6)
    assert shown["non-uniformity and its limit"] == pytest.approx([30.05, 19.8, 20.2], rel=1e-6)


def test_gradient_descent_has_non_uniformity_without_band(tmp_path: Path) -> None:
    """Catches an infinite band, a ratio of zero, and values lost because they have no limit."""
    events = write(tmp_path, [gd(1), gd(2)], max_diagrams=0)
    tags = [tag for tag in events.Tags()["scalars"] if "non" in tag]
    assert tags == ["stability/non_uniformity"]
    assert steps_of(events, "stability/non_uniformity") == [1, 2]


def test_tags_are_short_and_each_has_its_own(tmp_path: Path) -> None:
    """Catches a tag too long for the legend, and two numbers drawn as one curve."""
    run = [sgd(1, theorem1=1.2), failed(2), adam(3)]
    events = write(tmp_path, run, max_diagrams=0)
    tags = events.Tags()["scalars"]
    assert all(re.fullmatch(r"stability/\w{1,15}", tag) for tag in tags), tags
    names = {name for margins in run for name in margins.record()}
    bands = {tag for tags in series_of(events).values() for tag in tags}
    # All three ratios are values of charts, and counted there.
    assert len(tags) == len(names) - 3 + len(bands)


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    """Catches two quantities that silently share a tag after their names are shortened."""
    sink = TensorBoardSink(tmp_path, max_diagrams=0)
    with pytest.raises(ValueError, match="same tag"):
        sink(1, {"preconditioning1": 1.0, "preconditioning2": 2.0})
    sink.close()


def test_the_layout_is_constant_and_in_reverse(tmp_path: Path) -> None:
    """Catches a layout that differs from run to run, which TensorBoard shows twice."""
    a = layout_of(write(tmp_path / "a", [gd(1), gd(2)], max_diagrams=0))
    b = layout_of(write(tmp_path / "b", TWO_PHASES, max_diagrams=0))
    assert a == b
    (category,) = a.category
    titles = [chart.title for chart in category.chart]
    assert titles[-1] == "sharpness / limit"  # shown first
    assert titles[0] == "non-uniformity and its limit"
    assert not any(character.isdigit() for title in titles for character in title)


def test_a_failed_measurement_shows(tmp_path: Path) -> None:
    """Catches failures that are not shown, or that appear in the charts of the values."""
    events = write(tmp_path, [sgd(1), failed(2)])
    assert [event.value for event in events.Scalars("stability/failed")] == [0.0, 1.0]
    assert steps_of(events, "stability/sharpness") == [1]


def test_a_given_writer_stays_open_and_keeps_its_own(tmp_path: Path) -> None:
    """Catches a sink that closes the training script's writer, or opens a second one."""
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer, max_diagrams=0)
    sink(1, sgd(1).record())
    sink.close()
    writer.add_scalar("mine", 1.0, 2)
    writer.close()
    assert len(list(tmp_path.glob("events*"))) == 1
    assert {"mine", "stability/sharpness"} <= set(read(tmp_path).Tags()["scalars"])


@pytest.mark.parametrize("first", ["mine", "ours"])
def test_custom_scalars_of_a_given_writer_survive(tmp_path: Path, first: str) -> None:
    """Catches a second layout in one run: TensorBoard shows one of a run, and merges runs."""
    mine = {"mine": {"both": ["Multiline", ["loss/train", "loss/test"]]}}
    writer = SummaryWriter(str(tmp_path))
    if first == "mine":
        writer.add_custom_scalars(mine)
    sink = TensorBoardSink(writer, max_diagrams=0)
    sink(1, sgd(1).record())
    if first == "ours":
        writer.add_custom_scalars(mine)
    writer.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(runs, str(tmp_path))
    page = CustomScalarsPlugin(TBContext(data_provider=provider, logdir=str(tmp_path)))
    shown = page.layout_impl(RequestContext(), "")
    titles = [category["title"] for category in json.loads(shown)["category"]]
    assert sorted(titles) == ["edge of stability", "mine"]


def test_a_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """Catches charts that are two minutes behind, the writer's default delay."""
    sink = TensorBoardSink(tmp_path, max_diagrams=0)
    for step in (1, 2, 3):
        sink(step, sgd(step).record())
        assert steps_of(read(tmp_path), "stability/sharpness") == [*range(1, step + 1)]
    sink.close()


def test_more_points_than_are_shown_are_advised_of_once(tmp_path: Path) -> None:
    """Catches a long run that loses points without an explanation, and a warning at each step."""
    sink = TensorBoardSink(tmp_path, max_diagrams=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1000):
            sink(step, {"loss": 1.0})
        assert caught == []
        for step in range(1000, 1005):
            sink(step, {"loss": 1.0})
    assert ["--samples_per_plugin" in str(warning.message) for warning in caught] == [True]
    sink.close()


def test_it_prints_only_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a library that prints, and an announcement at every record."""
    write(tmp_path / "quiet", [sgd(1)], max_diagrams=0)
    assert capsys.readouterr().out == ""
    write(tmp_path / "a run", [sgd(1), sgd(2)], max_diagrams=0, announce=True)
    command, link = capsys.readouterr().out.splitlines()
    assert command == f"tensorboard --logdir '{tmp_path / 'a run'}'"
    assert link == "http://localhost:6006/#custom_scalars&_smoothingWeight=0"


def legacy_numpy_state() -> list[int]:
    # The legacy generator is what training scripts draw from.
    return np.random.get_state()[1].tolist()  # noqa: NPY002


def test_random_state_is_left_alone(tmp_path: Path) -> None:
    """Catches a draw from any global generator, which would change the training it watches."""
    before, torch_before = (random.getstate(), legacy_numpy_state()), torch.get_rng_state()
    write(tmp_path, map(sgd, range(1, 8)))
    assert before == (random.getstate(), legacy_numpy_state())
    assert torch.equal(torch_before, torch.get_rng_state())


def test_an_optimizer_drives_it(tmp_path: Path) -> None:
    """Catches a sink that the monitor cannot call or flush: it only warns, and warnings raise."""
    model, (x, y) = nn.Linear(2, 1), (torch.randn(8, 2), torch.randn(8, 1))
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    sink = TensorBoardSink(tmp_path)
    quantities = ("sharpness", "non_uniformity")
    with optimizer.track(
        model, nn.MSELoss(), (x, y), every=1, batch_size=4, quantities=quantities, sinks=[sink]
    ):
        for _ in range(3):
            optimizer.zero_grad()
            nn.MSELoss()(model(x[:4]), y[:4]).backward()
            optimizer.step()
    events = read(tmp_path)
    assert steps_of(events, "stability/non_unif_ratio") == [1, 2, 3]
    assert [event.step for event in events.Images("stability/diagram")] == [1, 2, 3]
    sink.close()


def test_decisions_are_scalars_words_and_marks(tmp_path: Path) -> None:
    """Catches decisions that TensorBoard does not show, and a staircase with a mark at each step."""
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink(step, sgd(step).record())
        sink.receive(
            Decided(step, Decision("lr", "raise", 0.1 * step, 0.1 * step + 0.1, "why", step=step))
        )
    for decision in (
        Decision("weights", "restore", 4.0, 2.0, "why", step=4),
        Decision("batch_size", "lower", 8.0, 4.0, "why", step=4),
        Decision("lr", "hold", 0.4, 0.4, "why", step=4),
    ):
        sink.receive(Decided(4, decision))
    marks = [(1, "raise lr"), (4, "restore weights"), (4, "lower batch size")]
    assert sink._diagrams._marks == marks
    sink.close()
    events = read(tmp_path)
    assert steps_of(events, "stability/lr_to") == [1, 2, 3, 4]
    assert steps_of(events, "stability/batch_size_to") == [4]
    words = events.Tensors("stability/decisions/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in words]
    assert texts[:2] == ["step 1: raise lr 0.1 → 0.2: why", "step 2: raise lr 0.2 → 0.3: why"]


def test_a_negative_number_of_diagrams_is_refused(tmp_path: Path) -> None:
    """Catches a negative number that is treated as zero."""
    with pytest.raises(ValueError, match=r"max_diagrams=-1"):
        TensorBoardSink(tmp_path, max_diagrams=-1)


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [
        ("torch.utils.tensorboard", "TensorBoardSink('unused', max_diagrams=0)", "tensorboard"),
        ("matplotlib", "TensorBoardSink('unused')", "plot"),
        ("matplotlib", "plot.diagram()", "plot"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, module: str, call: str, extra: str) -> None:
    """Catches an eager import of an optional package, and an error that does not help."""
    code = f"""
import sys
import stableopt
from stableopt import *
from stableopt import plot
assert not {{"tensorboard", "matplotlib"}} & set(sys.modules)
sys.modules[{module!r}] = None
try:
    {call}
except ImportError as error:
    assert "pip install stableopt[{extra}]" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not (tmp_path / "unused").exists()


def test_a_registered_chart_is_in_the_layout(tmp_path: Path) -> None:
    """Catches a fixed list of charts in the sink: a registered quantity brings its own chart."""
    chart = Chart("trace", "tr H", tag="trace", band=0.1)
    register(Quantity("trace_of_hessian", lambda at: QuantityResult(), chart=chart))
    try:
        margins = StabilityMargins(step=1, trace_of_hessian=3.0, trace_of_hessian_limit=4.0)
        events = write(tmp_path, [margins], max_diagrams=0)
    finally:
        del QUANTITIES["trace_of_hessian"]
    tags = series_of(events)
    assert [*tags][:2] == ["trace and its limit", "trace / limit"]  # shown last
    shown = {title: [events.Scalars(tag)[0].value for tag in tags[title]] for title in [*tags][:2]}
    # float32 has seven digits.
    assert shown["trace / limit"] == pytest.approx([0.75, 0.9, 1.1], rel=1e-6)
    assert shown["trace and its limit"] == pytest.approx([3.0, 3.6, 4.4], rel=1e-6)
    assert all(len(tag) <= 25 for tag in events.Tags()["scalars"])
