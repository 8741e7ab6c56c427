"""Tracked runs of SGD are the untracked ones; checkpoints and copies carry no monitor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from saved import through_file
from sgd_runs import ARITHMETIC, accepted, backward, fit, name_of, network, same, track, weights
from torch import Tensor, nn

import stableopt

TRACKED = [
    {**arithmetic, **path}
    for arithmetic in filter(accepted, ARITHMETIC)
    for path in ({"foreach": False}, {"foreach": True}, {"fused": True})
]


@pytest.mark.parametrize("options", TRACKED, ids=name_of)
def test_tracked_run_is_the_untracked_one(options: dict[str, Any]) -> None:
    """Catches a measurement that shifts weights or momentum, on any path of the step."""
    model, other = network(), network()
    optimizer = stableopt.SGD(model.parameters(), lr=torch.tensor(0.05), **options)
    reference = torch.optim.SGD(other.parameters(), lr=torch.tensor(0.05), **options)
    monitor = track(optimizer, model, every=2)
    assert same(fit(model, optimizer), fit(other, reference))
    assert [(m.step, m.failure) for m in monitor.history] == [(2, None), (4, None)]


def test_tracked_groups_run_as_the_untracked() -> None:
    """Catches the change of coordinates for several groups being written into the parameters."""
    model, other = network(), network()

    def groups(model: Any) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.2, "weight_decay": 0.1},
            {"params": model[2].parameters()},
        ]

    optimizer = stableopt.SGD(groups(model), lr=0.05, momentum=0.5)
    monitor = track(optimizer, model)
    assert same(
        fit(model, optimizer), fit(other, torch.optim.SGD(groups(other), lr=0.05, momentum=0.5))
    )
    assert all(m.failure is None for m in monitor.history)
    assert len(monitor.history) == 4


OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


@pytest.mark.parametrize(
    ("before", "after"),
    [(stableopt.SGD, torch.optim.SGD), (torch.optim.SGD, stableopt.SGD)],
    ids=["to_torch", "from_torch"],
)
def test_checkpoints_are_exchanged_with_torch(before: Any, after: Any) -> None:
    """Catches keys that torch does not know, and objects that weights_only loading refuses."""
    other = network()
    reference = torch.optim.SGD(other.parameters(), **OPTIONS)
    fit(other, reference, range(3))

    model = network()
    optimizer = before(model.parameters(), **OPTIONS)
    if isinstance(optimizer, stableopt.SGD):
        track(optimizer, model)
    fit(model, optimizer, range(3))
    state, weight = through_file((optimizer.state_dict(), model.state_dict()))
    assert state["param_groups"] == reference.state_dict()["param_groups"]
    assert {k: set(v) for k, v in state["state"].items()} == {
        k: {"momentum_buffer"} for k in range(4)
    }

    resumed = network()
    resumed.load_state_dict(weight)
    # Other options, so that what is loaded has something to overwrite.
    successor = after(resumed.parameters(), lr=1.0)
    if isinstance(successor, stableopt.SGD):
        track(successor, resumed)
    successor.load_state_dict(state)
    assert same(fit(resumed, successor, range(3, 6)), fit(other, reference, range(3, 6)))


def copied(pair: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(pair)
    if way == "pickle":
        return pickle.loads(pickle.dumps(pair))
    return through_file(pair, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_tracked_pair_train_on_untracked(way: str) -> None:
    """Catches a monitor that is copied along, measures twice, or counts the copy's batches."""
    model = network()
    optimizer = stableopt.SGD(model.parameters(), **OPTIONS)
    monitor = track(optimizer, model)
    fit(model, optimizer, range(2))
    twin, twin_optimizer = copied((model, optimizer), way)
    assert type(twin_optimizer) is stableopt.SGD
    assert twin_optimizer.monitor is None
    assert twin_optimizer.margins is None
    final = fit(twin, twin_optimizer, range(2, 5))
    assert monitor.step == 2
    assert same(fit(model, optimizer, range(2, 5)), final)
    assert monitor.step == 5
    # Batches of 3 each; those of the twin, counted here too, would make one of 12.
    assert list(monitor._counter.observed) == [3] * 5


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_tracked_model_have_nothing_to_do_with_the_monitor(way: str) -> None:
    """Catches a model hook that drags optimizer, monitor or a local function into the copy."""
    model = network()
    optimizer = stableopt.SGD(model.parameters(), lr=0.05)
    monitor = track(optimizer, model, sinks=[lambda step, record: None])  # not to be pickled
    twin = copied(model, way)
    backward(twin, 0)
    fit(model, optimizer, range(1))
    assert list(monitor._counter.observed) == [3]
    assert same(weights(twin), weights(network()))


def test_group_added_while_tracked() -> None:
    """Catches parameters that are read only once: a group may be added later, as when layers thaw."""

    def run(kind: Any, tracked: bool) -> list[Tensor]:
        model: Any = network()
        model[2].requires_grad_(False)
        optimizer = kind(model[0].parameters(), lr=0.1, momentum=0.9)
        monitor = track(optimizer, model) if tracked else None
        fit(model, optimizer, range(2))
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
        fit(model, optimizer, range(2, 5))
        if monitor is not None:
            assert [m.failure for m in monitor.history] == [None] * 5
            assert [m.lr for m in monitor.history] == [0.1, 0.1, 0.2, 0.2, 0.2]
        return weights(model)

    assert same(run(stableopt.SGD, True), run(torch.optim.SGD, False))


def test_untracked_optimizer_has_no_margins() -> None:
    """Catches properties that fail or return numbers before ``track``."""
    optimizer = stableopt.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert optimizer.monitor is None
    assert optimizer.margins is None
    assert isinstance(optimizer, torch.optim.SGD)
