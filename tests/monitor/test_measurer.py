"""The measurer alone: what its events carry, and which errors it records instead of raising."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from monitored_runs import MSE, X, Y, linear
from torch import Tensor

from stableopt import Problem, UpdateRule
from stableopt._support.warn_once import WarnOnce
from stableopt.curvature import Cost
from stableopt.distributed.collectives import LostRankError
from stableopt.monitor.measurer import Measurer
from stableopt.monitor.sample_counter import SampleCounter
from stableopt.stability.rules.several import OptimizerBlock, SeparateBlocks


def measurer(rule: Any = None, loss_fn: Any = MSE, **options: Any) -> Measurer:
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    defaults: dict[str, Any] = {
        "quantities": ("sharpness",),
        "batch_size": 4,
        "dataset_size": None,
        "tol": 0.03,
        "max_iter": 50,
        "cold_every": 20,
        "seed": 0,
    }
    return Measurer(
        [optimizer],
        Problem(model, loss_fn, (X, Y)),
        SampleCounter(),
        WarnOnce(),
        update_rule=rule,
        **{**defaults, **options},
    )


def test_an_event_carries_the_rule_that_its_limits_are_of() -> None:
    """Catches limits and a rule read at different times, which sinks would draw in one figure."""
    rates = iter([0.5, 0.25, 0.125])  # the constructor reads the rule once
    measuring = measurer(lambda optimizer: UpdateRule(lr=next(rates)))
    events = [measuring.measure(step) for step in (1, 2)]
    assert [event.rule.lr for event in events if event.rule is not None] == [0.25, 0.125]
    assert [event.margins.sharpness_limit for event in events] == [8.0, 16.0]
    assert [event.step for event in events] == [1, 2]


@pytest.mark.parametrize(
    ("error", "kept"), [(OSError("gone"), True), (LostRankError("gone"), False)]
)
def test_an_error_becomes_a_failure_unless_a_rank_is_lost(error: Exception, kept: bool) -> None:
    """Catches an error that ends training, and a lost rank that leaves the others waiting."""
    calls = iter([UpdateRule(lr=0.5)])

    def rule(optimizer: Any) -> UpdateRule:
        for first in calls:
            return first
        raise error

    measuring = measurer(rule)
    if kept:
        event = measuring.measure_or_fail(3)
        assert (event.margins.failure, event.margins.step, event.rule) == ("OSError: gone", 3, None)
    else:
        with pytest.raises(LostRankError):
            measuring.measure_or_fail(3)
    with pytest.raises(type(error), match="gone"):
        measuring.measure(3)


def test_eigenvectors_are_those_of_matrices() -> None:
    """Catches the warm start of another quantity, such as the vectors of all layers."""
    measuring = measurer(quantities=("sharpness", "layers"))
    measuring.measure(3)
    assert set(measuring.starts) == {"sharpness", "layers"}
    assert set(measuring.eigenvectors()) == {"sharpness"}
    assert float(measuring.eigenvectors()["sharpness"].norm()) == pytest.approx(1.0)


def test_saved_eigenvectors_are_checked_before_they_are_used() -> None:
    """Catches a search that starts from vectors of another model or precision."""
    measuring = measurer()

    def starts(subspace: Tensor) -> Tensor:
        state = {**measuring.state_dict(), "starts": {"sharpness": subspace}}
        return measuring.read_state(state).starts["sharpness"]

    assert starts(torch.eye(2, dtype=torch.float64)).dtype == torch.float32
    # As of a large model.
    assert starts(torch.eye(2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"sharpness has shape \(3, 3\).*has 2 parameters"):
        starts(torch.eye(3))
    assert measuring.starts == {}


ALONE = OptimizerBlock("SGD", torch.optim.SGD([torch.zeros(1)], lr=0.1), UpdateRule(lr=0.1))


@pytest.mark.parametrize(
    ("rule", "quantities", "seconds"),
    [
        (None, ("layers",), 2 + 60),
        (UpdateRule(lr=0.1, preconditioner=SeparateBlocks("", [ALONE])), ("sharpness",), 2 + 60),
    ],
    ids=["the sharpness of layers", "the edges of several optimizers"],
)
def test_the_estimate_has_the_quantities_that_others_add(
    monkeypatch: pytest.MonkeyPatch, rule: Any, quantities: tuple[str, ...], seconds: float
) -> None:
    """Catches a first measurement that takes longer than the estimate that schedules it."""
    names = ("gradient", "sharpness", "preconditioned_sharpness")
    cost = {name: Cost(1, 1.0, 2.0**power, 0) for power, name in enumerate(names)}
    monkeypatch.setattr(Problem, "cost", lambda self, *, tol: cost)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several optimizers have no common limit
        assert measurer(rule, quantities=quantities).expected_seconds() == seconds
