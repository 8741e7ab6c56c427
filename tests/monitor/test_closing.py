"""A closed monitor: what depends on it refuses it, or says that it stops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt import (
    AdaptiveBatchSampler,
    FlightRecorder,
    StabilityController,
    StabilityLR,
    StabilityMonitor,
    TargetRegion,
)

LOSS = nn.MSELoss()
FLAT, EVEN = TargetRegion(sharpness=(0, 8.0)), TargetRegion(non_uniformity=(0, 1.0))


class Training:
    """A linear model, its optimizer with a monitor, and a step."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 1)
        self.x, self.y = torch.ones(4, 2), torch.zeros(4, 1)
        self.optimizer = stableopt.SGD(self.model.parameters(), lr=0.01)
        self.monitor = self.track()

    def track(self) -> StabilityMonitor:
        quantities = ("sharpness", "non_uniformity")
        data = (self.x, self.y)
        return self.optimizer.track(self.model, LOSS, data, every=2, quantities=quantities)

    def step(self, report: Callable[[Tensor], None] | None = None) -> None:
        self.optimizer.zero_grad()
        loss = LOSS(self.model(self.x), self.y)
        if report is not None:
            report(loss)
        loss.backward()
        self.optimizer.step()


def sampler() -> AdaptiveBatchSampler:
    return AdaptiveBatchSampler(range(64), 4)


@pytest.mark.parametrize(
    "attach",
    [
        lambda run, folder: FlightRecorder(run.monitor, folder),
        lambda run, _: StabilityLR(run.optimizer, run.monitor, FLAT),
        lambda run, _: StabilityController(run.monitor, FLAT),
        lambda run, _: StabilityController(run.monitor, EVEN, batch=sampler()),
    ],
)
def test_a_closed_monitor_is_refused(
    tmp_path: Path, attach: Callable[[Training, Path], object]
) -> None:
    """Catches what never acts, without a word, since a second `track` closed its monitor."""
    run = Training()
    assert not run.monitor.closed
    run.track()
    assert run.monitor.closed
    with pytest.raises(ValueError, match=r"the monitor is closed, .*attach to the monitor that"):
        attach(run, tmp_path)


def test_a_recorder_whose_monitor_was_closed_stops_with_a_warning(tmp_path: Path) -> None:
    """Catches reports whose steps are all step 1, and the loss of those that the recorder has."""
    run = Training()
    recorder = FlightRecorder(run.monitor, tmp_path, check_every=100)
    for _ in range(3):
        recorder.loss(torch.nan)
        run.step()
    run.track()
    with pytest.warns(RuntimeWarning, match="the flight recorder stopped after step 3: the mon"):
        recorder.loss(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            recorder.loss(torch.nan)
            run.step()
        recorder.close()
    assert [path.name for path in recorder.reports] == ["step-1"]
    assert [record.step for record in recorder.evidence.steps] == [1, 2, 3]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        (FLAT, {}, "StabilityLR keeps the learning rate after step 3"),
        (EVEN, {"batch": sampler()}, "StabilityController keeps the batch size after step 3"),
    ],
)
def test_steering_whose_monitor_was_closed_warns_once(
    target: TargetRegion, options: dict[str, AdaptiveBatchSampler], said: str
) -> None:
    """Catches a rate and a batch size that no measurement changes any more, without a word."""
    run = Training()
    controller = StabilityController(run.monitor, target, **options)
    for _ in range(3):
        run.step()
        controller.step()
    run.monitor.close()
    run.step()
    with pytest.warns(RuntimeWarning, match=said):
        controller.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.step()


@pytest.mark.parametrize("monitor_last", [True, False])
def test_closing_at_the_end_in_any_order_says_nothing(tmp_path: Path, monitor_last: bool) -> None:
    """Catches a false warning: of `with` blocks in either order, of a scheduler's step that follows the
    last step of the monitor, and of training that goes on without both.
    """
    run = Training()
    recorder = FlightRecorder(run.monitor, tmp_path)
    scheduler = StabilityLR(run.optimizer, run.monitor, FLAT)
    contexts = [run.monitor, recorder] if monitor_last else [recorder, run.monitor]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            for _ in range(3):
                run.step(recorder.loss)
        scheduler.step()
        run.step(recorder.loss)
