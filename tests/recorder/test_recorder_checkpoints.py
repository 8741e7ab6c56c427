"""Checkpoints of the flight recorder: a resumed run writes the reports of an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from recorded_runs import Run

from stableopt import FlightRecorder

LATE = {"check_every": 1000, "measure": False}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


def take_steps(run: Run, first: int, last: int) -> FlightRecorder:
    """Report a loss that is not finite at step 31 alone, and the present gradients."""
    assert run.recorder is not None
    for k in range(first, last + 1):
        run.recorder.loss(math.nan if k == 31 else 1.0)
        run.optimizer.step()
    return run.recorder


def test_a_checkpoint_continues_the_window(tmp_path: Path) -> None:
    """Catches a resumed run that has lost the evidence of earlier steps."""
    whole = Run(tmp_path / "a")
    whole.train(40)
    state = whole.recorder.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other = Run(tmp_path / "b")
    other.recorder.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.recorder.evidence == whole.recorder.evidence
    with pytest.raises(ValueError, match="evidence"):
        other.recorder.load_state_dict({})


def test_an_alarm_before_a_checkpoint_is_reported_after_it(tmp_path: Path) -> None:
    """Catches an alarm that is lost, since the checkpoint read its steps before the next check."""
    whole, first, second = (Run(tmp_path / name, lr=1e-3, **LATE) for name in "abc")
    take_steps(whole, 1, 100).close()
    state = json.loads(json.dumps(take_steps(first, 1, 60).state_dict()))
    assert second.recorder is not None
    second.recorder.load_state_dict(state)
    second.monitor.load_state_dict(first.monitor.state_dict())
    take_steps(second, 61, 100).close()
    assert whole.report()["alarm"]["step"] == 31
    assert second.report()["alarm"] == whole.report()["alarm"]
    assert second.report()["evidence"]["steps"] == whole.report()["evidence"]["steps"]


def test_loading_forgets_the_steps_of_another_run(tmp_path: Path) -> None:
    """Catches a report of an alarm, or steps, that the recorder saw before it loaded a state."""
    healthy, used = Run(tmp_path / "a", lr=1e-3, **LATE), Run(tmp_path / "b", lr=1e-3, **LATE)
    state = take_steps(healthy, 1, 10).state_dict()
    recorder = take_steps(used, 1, 60)
    recorder.state_dict()  # reads steps, and keeps the alarm among them
    take_steps(used, 61, 70)  # stay on the device
    recorder.load_state_dict(state)
    recorder.close()
    assert recorder.reports == []
    assert [step.step for step in recorder.evidence.steps] == list(range(1, 11))


def test_a_state_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Catches a refusal of states without the entries that came later."""
    run, resumed = Run(tmp_path / "a", lr=1e-3), Run(tmp_path / "b", lr=1e-3)
    state = take_steps(run, 1, 10).state_dict()
    old = {name: state[name] for name in ("evidence", "quiet_until", "reports")}
    assert resumed.recorder is not None
    resumed.recorder.load_state_dict(old)
    assert len(resumed.recorder.evidence.steps) == 10
