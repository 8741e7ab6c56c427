"""Attaching and closing a monitor."""

from __future__ import annotations

import pytest
from monitored_runs import MSE, X, Y, hooks_left, linear, start, train

import stableopt
from stableopt import StabilityMonitor


class Sink:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.flushed = 0

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self.steps.append(step)

    def flush(self) -> None:
        self.flushed += 1


def test_close_detaches() -> None:
    """Catches hooks that remain after closing, and a history that is lost."""
    sink = Sink()
    model, optimizer, monitor = start(sinks=[sink])
    train(model, optimizer)
    assert hooks_left(optimizer, model) == 2  # the step's and the forward pass's
    monitor.close()
    assert hooks_left(optimizer, model) == 0
    train(model, optimizer)
    assert (sink.steps, sink.flushed, monitor.step) == ([1], 1, 1)
    assert monitor.margins is not None
    monitor.close()  # a second time does no harm


def test_context_closes_whatever_happens() -> None:
    """Catches hooks left by a training loop that raises, and an exception that is swallowed."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    sink = Sink()
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1, sinks=[sink])

    def loop() -> None:
        with monitor as entered:
            assert entered is monitor
            train(model, optimizer)
            raise KeyError("a bug of the loop")

    with pytest.raises(KeyError, match="a bug of the loop"):
        loop()
    assert hooks_left(optimizer, model) == 0
    assert (sink.flushed, len(monitor.history)) == (1, 1)


def test_tracking_again_closes_the_first() -> None:
    """Catches two monitors that both measure, and a refused ``track`` that ends the one before."""
    sink = Sink()
    model, optimizer, first = start(sinks=[sink])
    train(model, optimizer)
    with pytest.raises(ValueError, match="every=0"):
        optimizer.track(model, MSE, (X, Y), every=0)
    assert optimizer.monitor is first
    train(model, optimizer)
    second = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    assert optimizer.monitor is second
    assert (first.step, second.step) == (2, 1)
    assert (sink.steps, sink.flushed) == ([1, 2], 1)
    assert hooks_left(optimizer, model) == 2
    assert optimizer.margins is second.margins
