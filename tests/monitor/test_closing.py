"""A closed monitor: what depends on it refuses it, or says that it stops."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from monitored_runs import hooks_left
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
        options = {"quantities": quantities, "dataset_size": len(data[0])}
        return self.optimizer.track(self.model, LOSS, data, every=2, **options)

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


def untracked(steps: int) -> nn.Module:
    """Return the model after ``steps`` without a monitor."""
    torch.manual_seed(0)
    run = Training()
    run.monitor.close()
    for _ in range(steps):
        run.step()
    return run.model


@pytest.mark.parametrize("what", ["close the monitor", "close the recorder", "track", "record"])
@pytest.mark.parametrize("other", ["a recorder", "a hook"])
def test_a_sink_may_attach_and_detach(tmp_path: Path, what: str, other: str) -> None:
    """Catches hooks that change while torch iterates over them: the step would raise, after it was
    taken, if another hook follows.

    The sink acts at step 2; the monitor measures every second step.
    """
    torch.manual_seed(0)
    run, seen = Training(), list[int]()
    former, recorders = run.monitor, list[FlightRecorder]()

    def act(step: int, record: dict[str, float]) -> None:
        if what == "close the monitor":
            former.close()
        elif what == "close the recorder":
            recorders[0].close()
        elif what == "track":
            run.monitor = run.track()
        else:
            recorders.append(FlightRecorder(run.monitor, tmp_path))
        seen.append(step)

    former.sinks.append(act)
    if other == "a recorder" or what == "close the recorder":
        recorders.append(FlightRecorder(former, tmp_path))
    if other == "a hook":
        run.optimizer.register_step_post_hook(lambda *_: seen.append(-1))
    for _ in range(2):
        run.step()
    assert former.closed == (what in ("close the monitor", "track"))
    former.sinks.remove(act)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the flight recorder stopped after step 2")
        for _ in range(2):
            run.step()
    assert seen == ([-1, 2, -1, -1, -1] if other == "a hook" else [2])
    assert [m.step for m in former.history] == ([2] if former.closed else [2, 4])
    if what == "track":
        assert run.monitor.step == 2
        assert [m.step for m in run.monitor.history] == [2]
    if what == "record":
        assert [step.step for step in recorders[-1].evidence.steps] == [3, 4]
    for each in (*recorders, run.monitor):
        each.close()
    assert hooks_left(run.optimizer, run.model) == (other == "a hook")
    assert "step" not in vars(run.optimizer)
    assert torch.equal(run.model.weight, untracked(4).weight)


def test_hooks_that_leave_in_a_step_leave_no_trace_in_copies() -> None:
    """Catches an optimizer that is copied with them, and a warning of a scheduler whose mark is lost."""
    run = Training()
    run.monitor.sinks.append(lambda step, record: run.monitor.close())
    run.monitor = run.optimizer.track(
        run.model, LOSS, (run.x, run.y), every=1, sinks=run.monitor.sinks
    )
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    run.optimizer.register_step_post_hook(lambda *_: None)
    run.step()
    assert run.monitor.closed
    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        assert hooks_left(copied, nn.Module()) == 0
        assert "step" not in vars(copied)
    scheduler.step()  # warnings are errors here
    run.step()
    assert hooks_left(run.optimizer, run.model) == 1


def test_a_sink_after_the_one_that_closes_is_flushed_last() -> None:
    """Catches a last record that stays in a buffer: the sinks were flushed before it came."""
    run, calls = Training(), list[Any]()

    class Buffered:
        def __call__(self, step: int, record: dict[str, float]) -> None:
            calls.append(step)

        def flush(self) -> None:
            calls.append("flush")

    run.monitor.sinks += [lambda step, record: run.monitor.close(), Buffered()]
    for _ in range(4):
        run.step()
    assert calls[-2:] == [2, "flush"]
