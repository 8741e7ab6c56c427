"""What all laws have in common: their state, and numbers that are not finite."""

from __future__ import annotations

import math

import pytest

from stableopt import StabilityMargins, TargetRegion, UpdateRule
from stableopt.steering.law_state import at_step, without
from stableopt.steering.lr_laws import LRMeasured, gated_staircase, keep_margin


def test_a_state_is_never_changed_in_place() -> None:
    """Catches a checkpoint that changes with the law, and steps of a lost counter that stay."""
    state = {"step": 900.0, "until": 1000.0, "mean": 2.0}
    assert at_step(state, 10, "until") == {"mean": 2.0, "step": 10}
    assert at_step(state, 901, "until") == {**state, "step": 901}
    assert without(state, "mean", "other") == {"step": 900.0, "until": 1000.0}
    assert state == {"step": 900.0, "until": 1000.0, "mean": 2.0}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_change_nothing_upwards(value: float) -> None:
    """Catches a rate that rises on a NaN, an error on an infinity, an infinite loss without a cut."""
    for law, target in (
        (gated_staircase, TargetRegion(sharpness=(0, 10.0))),
        (keep_margin, TargetRegion.within_limits(0.8)),
    ):
        options = {"min_lr": 0.01}
        for margins, kind in (
            (StabilityMargins(step=10, sharpness=value), "hold"),
            (StabilityMargins(step=10, sharpness=12.0, loss=value), "cut"),
        ):
            decision, _ = law(LRMeasured(margins, UpdateRule(lr=0.05), target, **options), {})
            assert decision.kind == kind
            assert str(value) in decision.why
