"""Arguments that the monitor refuses, and what each error names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from first_order import Unread
from monitored_runs import MSE, Grumpy, X, Y, hooks_left, linear, train
from torch import nn

import stableopt
from stableopt import StabilityMonitor, UpdateRule

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every=0"),
    ({"every": -1}, "every=-1"),
    ({"every": True}, "every=True"),
    ({"every": 1.5}, r"every=1\.5"),
    ({"every": None, "max_overhead": 0}, "max_overhead=0"),
    ({"every": None, "max_overhead": -1}, "max_overhead=-1"),
    ({"every": None, "max_overhead": math.nan}, "max_overhead=nan"),
    ({"every": None, "max_overhead": math.inf}, "max_overhead=inf"),
    ({"every": 5, "max_overhead": 0.1}, "every and max_overhead"),
    ({"cold_every": -1}, "cold_every=-1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 13}, "batch_size=13 is above dataset_size=12"),
    ({"batch_size": 6, "dataset_size": 5}, "batch_size=6 is above dataset_size=5"),
    ({"dataset_size": 0}, "dataset_size=0"),
    ({"tol": 0.0}, r"tol=0\.0"),
    ({"tol": math.nan}, "tol=nan"),
    ({"max_iter": 0}, "max_iter=0"),
    ({"chunk_size": 0}, "chunk_size=0"),
    ({"quantities": "sharpness"}, "quantities='sharpness'"),
    ({"quantities": ()}, "quantities="),
    ({"quantities": ("flatness",)}, "flatness"),
    ({"params": []}, "params is empty"),
    ({"data": None}, "data"),
    ({"loss_fn": None}, "loss_fn"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    """Catches a bad argument found only by the first measurement, or an error that leaves hooks."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    arguments = {"loss_fn": MSE, "data": (X, Y), "every": 1, **options}
    with pytest.raises(ValueError, match=says):
        optimizer.track(model, **arguments)
    assert hooks_left(optimizer, model) == 0
    assert optimizer.monitor is None


def test_problem_with_arguments_that_are_its_own() -> None:
    """Catches a loss or data that is given along with a Problem and ignored."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    problem = stableopt.Problem(model, MSE, (X, Y))
    with pytest.raises(ValueError, match="a Problem has its own"):
        optimizer.track(problem, MSE)
    assert hooks_left(optimizer, model) == 0
    monitor = optimizer.track(problem, every=1)
    train(model, optimizer)
    assert monitor.margins is not None
    assert (monitor.margins.batch_size, monitor.margins.failure) == (4, None)
    # Losses and gradients suffice, for which a Problem of arguments would check no more.
    monitor = optimizer.track(problem, every=1, quantities=("realised_edge",))
    train(model, optimizer)
    assert monitor.margins is not None
    assert monitor.margins.failure is None


def test_parameter_that_the_optimizer_does_not_hold() -> None:
    """Catches a sharpness over parameters that never move; ``params=`` or freezing excludes them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = stableopt.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'1\.weight' is trainable but not in the optimizer"):
        optimizer.track(model, MSE, (X, Y))
    assert hooks_left(optimizer, model) == 0
    monitor = optimizer.track(model, MSE, (X, Y), every=1, params=model[0].parameters())
    assert monitor.problem.num_params == 6
    model[1].requires_grad_(False)
    assert optimizer.track(model, MSE, (X, Y), every=1).problem.num_params == 6


def test_parameter_that_the_model_does_not_hold() -> None:
    """Catches an optimizer that also moves other parameters, as with two networks in one optimizer."""
    model, other = linear(), linear()
    optimizer = stableopt.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="holds 1 parameters that are not the model's"):
        optimizer.track(model, MSE, (X, Y))
    assert hooks_left(optimizer, model) == 0
    optimizer.track(model, MSE, (X, Y), every=1, params=model.parameters())


@pytest.mark.parametrize(
    "measured",
    [
        lambda optimizer, problem: stableopt.measure(problem, optimizer=optimizer),
        lambda optimizer, problem: stableopt.critical_sharpness(problem, optimizer=optimizer),
        StabilityMonitor,
    ],
    ids=["measure", "critical_sharpness", "monitor"],
)
def test_parameters_chosen_by_a_problem(measured: Callable[[Any, Any], Any]) -> None:
    """Catches an optimizer of two networks accepted for a whole model, or refused for chosen ones."""
    model, other = linear(), linear()
    optimizer = stableopt.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"holds 1 parameters that are not the model's.*params="):
        measured(optimizer, stableopt.Problem(model, MSE, (X, Y)))
    measured(optimizer, stableopt.Problem(model, MSE, (X, Y), params=model.parameters()))


def test_optimizer_of_unknown_rule() -> None:
    """Catches limits of SGD for an unknown step; a rule given, or read by a function, is used."""
    model = linear()
    optimizer = Unread(model.parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match=r"UpdateRule\.register\(Unread.*update_rule="):
        unknown = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1)
    train(model, optimizer, steps=2)  # without another warning
    assert [m.step for m in unknown.history] == [1, 2]
    for margins in unknown.history:
        assert margins.sharpness is not None
        assert margins.realised_edge is not None
        assert (margins.sharpness_limit, margins.edge_ratio) == (None, None)
    unknown.close()
    for name in ("theorem1", "critical_lr", "preconditioned_sharpness"):
        with pytest.raises(ValueError, match=f"{name} needs the update rule.*update_rule="):
            StabilityMonitor(optimizer, model, MSE, (X, Y), quantities=[name])
    assert hooks_left(optimizer, model) == 0
    given = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1, update_rule=UpdateRule(lr=0.5))
    read = StabilityMonitor(
        optimizer,
        model,
        MSE,
        (X, Y),
        every=1,
        update_rule=lambda optimizer: UpdateRule(lr=optimizer.param_groups[0]["lr"]),
    )
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    train(model, optimizer)
    assert [m.sharpness_limit for m in given.history] == [4.0, 4.0]
    assert [m.sharpness_limit for m in read.history] == [20.0, 8.0]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"sinks": "runs"}, TypeError, "sinks='runs'"),
        ({"sinks": [None]}, TypeError, "None is not a callable"),
        ({"sinks": [Grumpy]}, TypeError, "is not a callable"),
        ({"batch_size": 2.5}, ValueError, "batch_size=2.5"),
        ({"batch_size": True}, ValueError, "batch_size=True"),
        ({"dataset_size": float("nan")}, ValueError, "dataset_size=nan"),
        ({"max_iter": 2.5}, ValueError, "max_iter=2.5"),
        ({"seed": "a"}, ValueError, "seed='a'"),
        ({"cold_every": None}, ValueError, "cold_every=None"),
        ({"max_overhead": "5"}, ValueError, "max_overhead='5'"),
        ({"tol": None}, ValueError, "tol=None"),
        ({"quantities": None}, ValueError, "quantities=None"),
        ({"update_rule": 5}, TypeError, "update_rule=5"),
        ({"update_rule": lambda optimizer: None}, TypeError, "expected an UpdateRule"),
        ({"params": ["0.weight"]}, TypeError, "params="),
    ],
)
def test_values_of_the_wrong_kind_are_named(options: Any, kind: Any, says: str) -> None:
    """Catches a plain Python error that names no argument, and a bad value that is found only later."""
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    with pytest.raises(kind, match=says):
        optimizer.track(model, MSE, (X, Y), **options)
    assert not optimizer._optimizer_step_post_hooks
    assert not model._forward_pre_hooks
