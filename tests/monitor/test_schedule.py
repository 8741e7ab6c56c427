"""When the monitor measures: every k steps, or within a share of the training time."""

from __future__ import annotations

import types
from typing import Any

import pytest
from monitored_runs import MSE, X, Y, linear, start, train
from torch import Tensor, nn

import stableopt
import stableopt.monitor.monitor


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_k_steps(every: int) -> None:
    """Catches counting from zero, which measures at steps 1, k + 1, ... and once too often."""
    model, optimizer, monitor = start(every=every)
    train(model, optimizer, 8)
    assert [m.step for m in monitor.history] == list(range(every, 9, every))
    assert monitor.step == 8


def test_steps_at_rate_zero_are_not_measured() -> None:
    """Catches infinite limits in a warm-up's first step, and a due measurement that is forgotten."""
    model, optimizer, monitor = start(every=2)
    for lr in (0.1, 0.0, 0.0, 0.1, 0.1, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer)
    # Due at 2, 4 and 6; step 2 moved nothing, nor did 3, so that one is made up for at 4.
    assert [m.step for m in monitor.history] == [4, 6]


def test_one_group_at_rate_zero_is_measured() -> None:
    """Catches a frozen group taken for a step that moved nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups: list[dict[str, Any]] = [{"params": m.parameters()} for m in model]
    groups[0]["lr"] = 0.0
    optimizer = stableopt.SGD(groups, lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer, 2)
    assert [(m.step, m.lr, m.failure) for m in monitor.history] == [(1, 0.1, None), (2, 0.1, None)]


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.125, 0.5, 2.0])
def test_share_of_the_training_time_is_held(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Catches a share of wall time instead of training time, and measuring far less than allowed.

    Times are multiples of 1/4, so that all sums are exact.
    """
    clock = Clock()
    monkeypatch.setattr(
        stableopt.monitor.schedule, "time", types.SimpleNamespace(perf_counter=clock)
    )

    def slow(output: Tensor, y: Tensor) -> Tensor:
        clock.now += 0.25
        return MSE(output, y)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, slow, (X, Y), max_overhead=share)
    due, waited, cost, spent = [], 0.0, 0.0, 0.0
    began = clock.now
    for step in range(1, 41):
        optimizer.zero_grad()
        MSE(model(X), Y).backward()
        clock.now += 0.5
        waited += 0.5
        before = clock.now
        optimizer.step()
        took = clock.now - before
        # A plain account of the same: a measurement may come when the last has been paid for.
        if waited >= cost / share:
            due.append(step)
            assert took > 0
            spent, cost, waited = spent + took, took, 0.0
        else:
            assert took == 0
    assert [m.step for m in monitor.history] == due
    assert len(due) >= 3
    # Up to the last, which is paid for afterwards.
    training = 40 * 0.5
    assert spent - cost <= share * training
    assert clock.now - began == training + spent
    assert monitor.overhead == spent / training


def test_default_share_is_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a default that measures every step: 1 s of measuring asks for 20 s of training."""
    clock = Clock()
    monkeypatch.setattr(
        stableopt.monitor.schedule, "time", types.SimpleNamespace(perf_counter=clock)
    )

    def slow(output: Tensor, y: Tensor) -> Tensor:
        # Once a measurement: all its products share the passes. A trial on a few samples is nothing.
        clock.now += 1.0 if len(y) == len(Y) else 0.0
        return MSE(output, y)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, slow, (X, Y))
    for _ in range(45):
        clock.now += 1.0
        train(model, optimizer)
    assert [m.step for m in monitor.history] == [1, 21, 41]
