"""Failures of a measurement or a sink do not stop training; they are recorded and warned of."""

from __future__ import annotations

import math

import pytest
import torch
from monitored_runs import MSE, Grumpy, X, Y, linear, start, train
from torch import Tensor, nn

import stableopt


def test_loss_that_is_not_finite() -> None:
    """Catches NaN recorded as a value, a warning at each step, and a failure that outlasts its cause."""
    model, optimizer, monitor = start()
    train(model, optimizer)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="step 2 failed: not finite: the loss is nan") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    with torch.no_grad():
        model.weight.fill_(1.0)
    train(model, optimizer)
    assert [m.failure is None for m in monitor.history] == [True, False, False, False, True]
    failed = monitor.history[1]
    assert (failed.sharpness, failed.stable, failed.converged) == (None, None, False)
    assert failed.record()["failed"] == 1.0
    assert failed.sharpness_limit == 20.0


def test_model_that_fails_on_the_probe_set() -> None:
    """Catches a measurement's exception that ends training; only a call of ``measure`` raises it."""

    class Moody(nn.Linear):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fail and not self.training:
                raise RuntimeError("not now")
            return super().forward(x)

    model = Moody(2, 1)
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    model.fail = True
    with pytest.warns(RuntimeWarning, match="step 2 failed: RuntimeError: not now") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="not now"):
        monitor.measure()
    model.fail = False
    train(model, optimizer)
    expected = [None, "RuntimeError: not now", "RuntimeError: not now", None]
    assert [m.failure for m in monitor.history] == expected
    assert model.training


def test_measurement_that_does_not_converge() -> None:
    """Catches a value that missed its tolerance but claims to have converged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1, max_iter=1, tol=1e-6)
    with pytest.warns(RuntimeWarning, match="did not converge.*raise max_iter or tol") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    assert [m.converged for m in monitor.history] == [False, False]
    assert [m.failure for m in monitor.history] == [None, None]


def test_failing_sink() -> None:
    """Catches a full disk that ends training, or one sink that keeps the next from its record."""
    records: list[tuple[int, dict[str, float]]] = []

    def spoil(step: int, record: dict[str, float]) -> None:
        record.clear()
        raise OSError("disk full")

    model, optimizer, monitor = start(
        sinks=[spoil, lambda step, record: records.append((step, record))]
    )
    with pytest.warns(RuntimeWarning, match="disk full") as caught:
        train(model, optimizer, 2)
    assert len(caught) == 1
    assert [step for step, _ in records] == [1, 2]
    assert [record for _, record in records] == [m.record() for m in monitor.history]


def test_a_sink_that_fails_in_every_way_ends_nothing() -> None:
    """Catches a failing `repr` or `flush`, a record sent twice, and sinks left unflushed."""
    flushed, received = [], []

    class Good:
        def __call__(self, step: int, record: dict[str, float]) -> None:
            received.append(step)

        def flush(self) -> None:
            flushed.append(True)

    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1, sinks=[Grumpy(), Good()])
    with pytest.warns(RuntimeWarning, match="the sink Grumpy failed"), monitor:
        train(model, optimizer)
    assert flushed == [True]
    assert received == [1]
    assert len(monitor.history) == 1
