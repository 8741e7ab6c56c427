"""Checks that constructors and `load_state_dict` share: what they name, and what they let through."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stableopt import (
    AdaptiveAccumulation,
    AdaptiveBatchSampler,
    FlightRecorder,
    StabilityController,
    StabilityLR,
    StabilityMargins,
    StabilityMonitor,
    StabilityRegion,
    TargetRegion,
    UpdateRule,
    critical_sharpness,
    measure,
    suggest,
)
from stableopt._support.arguments import instance, non_negative, require_keys
from stableopt.recorder import AlarmRules
from stableopt.stability import QuantityResult

FLAT = TargetRegion(sharpness=(0, 4.0))


def test_an_instance_is_returned_and_anything_else_is_named() -> None:
    """Catches a check that lets a wrong type through, or hides which argument it was."""
    assert instance("name", "value", str) == "value"
    assert instance("flag", True, int) is True
    with pytest.raises(TypeError, match=r"lr=0\.1: expected a str"):
        instance("lr", 0.1, str)


def test_a_message_shows_no_data() -> None:
    """Catches a model or a data set printed before the words that say what is wrong."""
    model, loss_fn = nn.Linear(2, 1), nn.MSELoss()
    data = torch.rand(100, 2), torch.zeros(100, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    muon = torch.optim.AdamW(model.parameters())
    for call, error, says in (
        (lambda: StabilityMonitor(optimizer, model, data, loss_fn), TypeError, "<tuple>: expected"),
        (lambda: suggest(model, loss_fn, data, optimizer=[optimizer, muon]), TypeError, "<list>"),
        (lambda: measure(model, loss_fn, {"x": data[0]}), TypeError, "data is a dict: expected"),
        (lambda: measure(model, loss_fn, [{"x": data[0]}]), TypeError, "got a dict; for diction"),
        (
            lambda: measure(model, loss_fn, tuple(part.numpy() for part in data)),
            TypeError,
            "got an array; convert arrays with torch.as_tensor",
        ),
        (lambda: StabilityRegion(0.3, 16), TypeError, "rule=0.3: expected an UpdateRule"),
        (lambda: StabilityMargins()["edge_ratio"], KeyError, "expected margins.edge_ratio, or"),
        (
            lambda: AlarmRules(loss_factor=0.5),
            ValueError,
            "loss_factor=0.5: expected a factor above",
        ),
    ):
        with pytest.raises(error, match=re.escape(says)) as raised:
            call()
        assert len(str(raised.value)) < 600


def test_what_users_print_says_what_it_is(tmp_path: Path) -> None:
    """Catches an address in memory, and a page of nested dataclasses."""
    tracked = Tracked(tmp_path)
    monitor, margins = tracked.monitor, tracked.monitor.measure()
    assert repr(monitor.problem) == "<Problem of Linear: 3 parameters, 4 samples>"
    assert repr(monitor) == f"<StabilityMonitor of SGD: step 0, {monitor.problem!r}>"
    monitor.close()
    assert "closed, step 0" in repr(monitor)
    assert str(margins).splitlines()[1:] == [
        "quantity   value  limit  ratio",
        "sharpness      6     20    0.3",
    ]
    failed = StabilityMargins(step=1_000, failure="not finite: the loss is nan")
    assert str(failed) == "step 1,000\nnot finite: the loss is nan"
    results = {"non_uniformity": QuantityResult(failure="no memory")}
    text = str(StabilityMargins(step=2, loss=0.5, batch_size=16_384, results=results))
    assert text == "step 2, loss 0.5, batch size 16,384\nnon-uniformity was not measured: no memory"


def test_missing_keys_are_named_and_others_allowed() -> None:
    """Catches a checkpoint of a later version that is refused for a key too many."""
    require_keys({"step": 1, "later": 2}, ("step",))
    with pytest.raises(ValueError, match=r"state_dict lacks \['seen', 'step'\]"):
        require_keys({"later": 2}, {"step": 0, "seen": 1})
    with pytest.raises(ValueError, match=r"evidence lacks \['step'\]"):
        require_keys({}, ("step",), name="evidence")


def test_zero_is_offered_where_it_is_allowed() -> None:
    """Catches a message that asks for a positive number although 0 is right."""
    assert non_negative("kick", 0) == 0.0
    for value in (-1, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match=r"kick=.*: expected 0 or a positive number"):
            non_negative("kick", value)


class Tracked:
    """Everything that has a `load_state_dict`, around one small model."""

    def __init__(self, folder: Path) -> None:
        model = nn.Linear(2, 1)
        self.problem = model, nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.monitor = StabilityMonitor(self.optimizer, *self.problem, every=1)
        self.recorder = FlightRecorder(self.monitor, folder)
        self.scheduler = StabilityLR(self.optimizer, self.monitor, FLAT)
        self.controller = StabilityController(self.monitor, FLAT, lr=self.scheduler)
        self.sampler = AdaptiveBatchSampler(range(4), 2)
        self.accumulation = AdaptiveAccumulation([torch.zeros(4)], 4)


@pytest.mark.parametrize("state", [None, 3, []])
def test_a_state_of_another_kind_is_named(tmp_path: Path, state: Any) -> None:
    """Catches an AttributeError from within, as for a checkpoint without an entry for the monitor."""
    run = Tracked(tmp_path)
    for name in ("monitor", "recorder", "scheduler", "controller", "sampler", "accumulation"):
        holder = getattr(run, name)
        with pytest.raises(TypeError, match=r"state_dict=.*: expected a Mapping"):
            holder.load_state_dict(state)
        with pytest.raises(ValueError, match="state_dict lacks"):
            holder.load_state_dict({})
    kept = run.recorder.state_dict()
    with pytest.raises(TypeError, match=r"evidence=.*: expected a Mapping"):
        run.recorder.load_state_dict({**kept, "evidence": state})
    with pytest.raises(TypeError):
        run.recorder.load_state_dict({**kept, "quiet_until": 99, "reports": 3})
    assert run.recorder.state_dict() == kept


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, 3, "SGD"])
def test_what_is_no_optimizer_is_named(tmp_path: Path, optimizer: Any) -> None:
    """Catches an AttributeError for a class, which is an easy slip for its instance."""
    run = Tracked(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: suggest(*run.problem, optimizer=optimizer),
        lambda: suggest(*run.problem, optimizer=optimizer, curvature=False),
        lambda: critical_sharpness(*run.problem, optimizer=optimizer),
        lambda: StabilityMonitor(optimizer, *run.problem),
        lambda: UpdateRule.from_optimizer(optimizer),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"optimizer=.*: expected (a torch|one optimizer)"):
            call()


def test_bounds_of_a_rate_say_what_they_allow(tmp_path: Path) -> None:
    """Catches a kick or a smallest rate that are said to exclude 0."""
    run = Tracked(tmp_path)
    for name in ("kick", "min_lr"):
        StabilityLR(run.optimizer, run.monitor, FLAT, **{name: 0})
        with pytest.raises(ValueError, match=f"{name}=-1: expected 0 or a positive number"):
            StabilityLR(run.optimizer, run.monitor, FLAT, **{name: -1})
    with pytest.raises(ValueError, match="max_lr=-1: expected a positive number"):
        StabilityLR(run.optimizer, run.monitor, FLAT, max_lr=-1)
