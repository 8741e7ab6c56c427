"""When the monitor measures: every k steps, or within a share of the training time."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from monitored_runs import MSE, X, Y, linear, start, train
from torch import Tensor, nn

import stableopt
import stableopt.monitor.schedule
from stableopt import StabilityMonitor
from stableopt.curvature import Cost, Problem
from stableopt.distributed.collectives import Ranks
from stableopt.monitor.schedule import Schedule, step_moved


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_k_steps(every: int) -> None:
    """Catches counting from zero, which measures at steps 1, k + 1, ...: once too often."""
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
    # Due at 2, 4 and 6; steps 2 and 3 moved nothing, so that the first is made up for at 4.
    assert [m.step for m in monitor.history] == [4, 6]


def test_one_group_at_rate_zero_is_measured() -> None:
    """Catches a step skipped as one that moved nothing because one group has rate zero."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    groups: list[dict[str, Any]] = [{"params": m.parameters()} for m in model]
    groups[0]["lr"] = 0.0
    optimizer = stableopt.SGD(groups, lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer, 2)
    assert [(m.step, m.lr, m.failure) for m in monitor.history] == [(1, 0.1, None), (2, 0.1, None)]


class Clock:
    """A clock that moves only when it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.125, 0.5, 2.0])
def test_share_of_the_training_time_is_held(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Catches a share of wall time instead of training time, and far fewer measurements than allowed.

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
        # The same by plain accounting: a measurement may come once the last is paid for.
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


class TwoRanks(Ranks):
    """Rank 0 of two; it counts the broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.asked = 2, 0

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        self.asked += 1
        return value


def test_a_measurement_that_is_due_waits_for_a_step_that_moves() -> None:
    """Catches a due measurement that is forgotten, or made twice."""
    schedule = Schedule(every=3)
    moves = [step not in (3, 4) for step in range(10)]
    turns = [
        step
        for step in range(1, 10)
        if schedule.should_measure(step, lambda s=step: moves[s], Ranks())
    ]
    assert turns == [5, 6, 9]


def test_what_is_pending_survives_a_checkpoint() -> None:
    """Catches a resumed run that skips the measurement it owed."""
    first, second = Schedule(every=3), Schedule(every=3)
    assert not first.should_measure(3, lambda: False, Ranks())
    second.restore(pending=first.pending)
    assert second.should_measure(4, lambda: True, Ranks())


def test_moving_is_looked_at_only_when_due() -> None:
    """Catches a host transfer in each step: `found_inf` of a gradient scaler is on the device."""
    looked = []
    schedule = Schedule(every=4)
    for step in range(1, 9):
        schedule.should_measure(step, lambda s=step: bool(looked.append(s)) or True, Ranks())
    assert looked == [4, 8]


def test_ranks_ask_rank_0_only_when_it_may_be_time() -> None:
    """Catches a broadcast in each step."""
    schedule, ranks = Schedule(every=4), TwoRanks()
    turns = [step for step in range(1, 14) if schedule.should_measure(step, lambda: True, ranks)]
    assert turns == [4, 8, 12]
    assert ranks.asked == 4  # at the first step, to learn when to ask again, and each time


@pytest.mark.parametrize("resumed", [0, 100_000])
def test_ranks_look_again_in_time_wherever_the_count_of_steps_begins(
    monkeypatch: pytest.MonkeyPatch, resumed: int
) -> None:
    """Catches steps of an earlier run counted into the length of a step, so that rank 0 is asked again
    only after 100,000 times the wait; and time from before a checkpoint was read that pays.
    """
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stableopt.monitor.schedule, "time", clock)
    schedule, ranks = Schedule(max_overhead=1 / 32, first_seconds=lambda: 2.0), TwoRanks()
    clock.now += 6.0
    schedule.restore(pending=False)
    turns = []
    for step in range(1, 131):
        clock.now += 1.0
        turns.append(schedule.should_measure(resumed + step, lambda: True, ranks))
        if turns[-1]:
            with schedule.timed():
                clock.now += 2.0
    assert [step for step, turn in enumerate(turns, 1) if turn] == [64, 128]
    assert ranks.asked < 20  # the rest is halved: about seven times for each wait of 64 steps


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_measurement_is_paid_for_too(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Catches failing measurements at each step because their time does not count."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stableopt.monitor.schedule, "time", clock)
    schedule = Schedule(max_overhead=0.25)
    assert schedule.should_measure(1, lambda: True, Ranks())
    try:
        with schedule.timed():
            clock.now += 2.0
            if fails:
                raise OSError
    except OSError:
        pass
    turns = []
    for step in range(2, 12):
        clock.now += 1.0
        turns.append(schedule.should_measure(step, lambda: True, Ranks()))
    assert turns.index(True) == 7  # the eighth second pays for two at a quarter
    assert schedule.overhead == 0.2


@pytest.mark.parametrize(("expected", "turn"), [(2.0, 8), (0.5, 1)])
def test_the_first_measurement_waits_until_it_is_affordable(
    monkeypatch: pytest.MonkeyPatch, expected: float, turn: int
) -> None:
    """Catches a first measurement that exceeds the share, and a wait for one of negligible cost."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(stableopt.monitor.schedule, "time", clock)
    schedule, turns = Schedule(max_overhead=0.25, first_seconds=lambda: expected), []
    for step in range(1, 10):
        clock.now += 1.0
        turns.append(schedule.should_measure(step, lambda: True, Ranks()))
    assert turns.index(True) + 1 == turn
    # With a fixed number of steps nothing is estimated.
    Schedule(every=1, first_seconds=lambda: pytest.fail("it was asked"))


def test_a_monitor_estimates_its_first_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches quantities missing from the estimate, and an explicit ``measure()`` that waits."""
    model = linear()
    optimizer = torch.optim.Adam(model.parameters())
    cost = {
        name: Cost(1, 1.0, 2.0**power, 0)
        for power, name in enumerate(("gradient", "sharpness", "preconditioned_sharpness"))
    }
    monkeypatch.setattr(Problem, "cost", lambda self, *, tol: cost)
    quantities = ("sharpness", "non_uniformity")
    with StabilityMonitor(
        optimizer, model, MSE, (X, Y), quantities=quantities, batch_size=1
    ) as monitor:
        assert monitor._measurer.expected_seconds() == 2 + 4 + 60
        MSE(model(X), Y).backward()
        optimizer.step()
        assert not monitor.history
        assert monitor.measure().sharpness is not None


def test_a_step_moves_unless_its_rates_are_zero_or_a_scaler_skipped_it() -> None:
    """Catches curvature measured after a step that did nothing."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert step_moved(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    assert not step_moved(optimizer)
    optimizer.found_inf = torch.tensor(0.0)
    assert step_moved(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    assert not step_moved(optimizer)
