"""Saving and loading the state of a monitor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from monitored_runs import MSE, X, Y, linear, start, train
from saved import through_file
from torch import nn

import stableopt
from stableopt import StabilityMonitor


def timeless(monitor: StabilityMonitor) -> Iterator[dict[str, Any]]:
    """Yield the margins as plain values, without wall times."""
    for margins in monitor.history:
        plain = margins.to_dict()
        for measurement in plain["measurements"].values():
            del measurement["seconds"]
        yield plain


@pytest.mark.parametrize("break_at", [1, 3, 4])
def test_resumed_monitor_continues_bit_for_bit(break_at: int) -> None:
    """Catches state missing from a checkpoint: warm starts, seeds, cold starts, a due measurement."""
    # Step 4 moves nothing, so that a break there leaves a measurement due.
    lrs = [0.05, 0.05, 0.05, 0.0, 0.05, 0.05, 0.05, 0.05]

    def build() -> tuple[nn.Module, stableopt.SGD, StabilityMonitor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
        quantities = ("sharpness", "non_uniformity")
        monitor = optimizer.track(model, MSE, (X, Y), every=2, quantities=quantities, cold_every=2)
        return model, optimizer, monitor

    def go(model: nn.Module, optimizer: stableopt.SGD, steps: range) -> None:
        for step in steps:
            optimizer.param_groups[0]["lr"] = lrs[step]
            train(model, optimizer, rows=slice(0, 3 + step))

    model, optimizer, whole = build()
    go(model, optimizer, range(8))

    model, optimizer, first = build()
    go(model, optimizer, range(break_at))
    state = through_file([model.state_dict(), optimizer.state_dict(), first.state_dict()])
    model, optimizer, second = build()
    for part, saved in zip((model, optimizer, second), state, strict=True):
        part.load_state_dict(saved)
    go(model, optimizer, range(break_at, 8))

    assert [m.step for m in whole.history] == [2, 5, 6, 8]
    assert second.step == 8
    assert list(timeless(second)) == list(timeless(whole))


def test_state_of_another_model_is_refused() -> None:
    """Catches an eigenvector of another size that would make the next measurement fail."""
    model, optimizer, monitor = start()
    train(model, optimizer)
    state = monitor.state_dict()
    wider = nn.Linear(3, 1)
    other = stableopt.SGD(wider.parameters(), lr=0.1).track(
        wider, MSE, (torch.ones(2, 3), torch.ones(2, 1)), every=1
    )
    with pytest.raises(ValueError, match=r"sharpness has shape \(2, 2\).*4 parameters"):
        other.load_state_dict(state)
    assert other.step == 0


def test_numpy_integers_are_integers() -> None:
    """Catches a checkpoint that `weights_only` refuses because of a NumPy scalar in it."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    sizes = {"every": np.int64(1), "batch_size": np.int64(2), "dataset_size": np.int64(9)}
    monitor = optimizer.track(model, MSE, (X, Y), **sizes)
    train(model, optimizer)
    assert through_file(monitor.state_dict())["history"][0]["batch_size"] == 2


def test_a_bad_checkpoint_changes_nothing() -> None:
    """Catches a monitor left half loaded."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer)
    state = monitor.state_dict()
    with pytest.raises(ValueError, match="state_dict lacks"):
        monitor.load_state_dict({"starts": {}})
    with pytest.raises(KeyError):
        monitor.load_state_dict({**state, "step": 99, "history": [{}]})
    for name, wrong in [("measured", None), ("memory", 3), ("observed", None), ("observed", ["x"])]:
        with pytest.raises((TypeError, ValueError)):
            monitor.load_state_dict({**state, "step": 99, "history": [], name: wrong})
    assert monitor.step == 1
    assert len(monitor.history) == 1
    assert monitor.state_dict()["starts"]
    assert monitor.state_dict()["observed"] == state["observed"]


def test_a_state_of_an_earlier_version_is_read() -> None:
    """Catches a failure to read older checkpoints, which name every quantity, also unmeasured ones."""
    measurement = {
        "value": 6.0,
        "residual": 0.01,
        "products": 2,
        "seconds": 0.5,
        "converged": True,
    }
    margins = {
        "step": 4,
        "lr": 0.1,
        "batch_size": 4,
        "dataset_size": 12,
        "loss": 0.25,
        "sharpness": 6.0,
        "sharpness_limit": 20.0,
        "preconditioned_sharpness": None,
        "preconditioned_sharpness_limit": None,
        "non_uniformity": None,
        "non_uniformity_limit": 24.4,
        "theorem1": None,
        "critical_lr": None,
        "critical_lr_lower": None,
        "batch_sharpness": None,
        "measurements": {"sharpness": measurement},
        "failure": None,
        "method": "double backward",
    }
    state = {
        "step": 5,
        "measured": 2,
        "pending": True,
        "observed": [4, 4, 3],
        "starts": {"sharpness": torch.eye(2)},
        "history": [margins],
    }
    model, optimizer, monitor = start(every=4)
    monitor.load_state_dict(state)
    written = monitor.state_dict()
    (again,) = written.pop("history")
    assert written.pop("memory") == {}
    assert again.items() <= margins.items()
    assert {name for name, value in margins.items() if value is not None} <= {*again}
    assert {**written, "starts": 0} == {**{k: state[k] for k in written}, "starts": 0}
    assert torch.equal(written["starts"]["sharpness"], torch.eye(2))
    assert (monitor.margins.sharpness_ratio, monitor.batch_size) == (0.3, 4)
    train(model, optimizer)
    assert [m.step for m in monitor.history] == [4, 6]  # what was pending is not forgotten


def test_a_checkpoint_after_unfreezing_is_resumed() -> None:
    """Catches warm starts of the parameters before, which the next measurement drops, and loading
    refuses.
    """

    def build(*, frozen: bool) -> tuple[nn.Module, stableopt.SGD, StabilityMonitor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        model[0].requires_grad_(not frozen)
        optimizer = stableopt.SGD(model.parameters(), lr=0.05)
        return model, optimizer, optimizer.track(model, MSE, (X, Y), every=2)

    model, optimizer, monitor = build(frozen=True)
    train(model, optimizer)
    train(model, optimizer)
    model[0].requires_grad_(True)
    train(model, optimizer)
    saved = through_file([part.state_dict() for part in (model, optimizer, monitor)])
    train(model, optimizer)
    resumed = build(frozen=False)
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[1])
    assert [m.step for m in resumed[2].history] == [2, 4]
    assert list(timeless(resumed[2])) == list(timeless(monitor))
