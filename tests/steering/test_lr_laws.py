"""The laws of the learning rate, on the smallest loss that has minima of every sharpness.

f = (1 - u v)^2 / 2 is minimal wherever u v = 1, with sharpness u^2 + v^2, from 2 to infinity. Gradient
descent at a rate above 2/(u^2 + v^2) leaves for a flatter one, or diverges if it is too far above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableopt import StabilityMargins, TargetRegion, UpdateRule
from stableopt.stability import Measurement
from stableopt.steering.decision import Decision
from stableopt.steering.law_state import State, new_state
from stableopt.steering.lr_laws import (
    Law,
    LRMeasured,
    gated_staircase,
    keep_margin,
    momentum_gate,
)

SHARP = 25.04  # of u = 5, v = 1/5


def sharpness(u: float, v: float) -> float:
    """Return the largest eigenvalue of [[v^2, 2uv - 1], [2uv - 1, u^2]]."""
    mean, half = (u * u + v * v) / 2, (u * u - v * v) / 2
    return mean + math.hypot(half, 2 * u * v - 1)


def descend(
    law: Law, target: TargetRegion, steps: int, *, lr: float, every: int = 1, **bounds: float
) -> tuple[float, float, float, list[Decision]]:
    """Return sharpness, loss and rate after gradient descent under ``law``, and the decisions."""
    u, v, state, decisions = 5.0, 0.2 + 1e-4, new_state(), []
    for step in range(1, steps + 1):
        error = u * v - 1
        # In float64 this loss reaches zero, where gradient descent stays; networks do not.
        u, v = u - lr * error * v, v - lr * error * u + 1e-9 * (-1) ** step
        loss = (u * v - 1) ** 2 / 2
        if step % every == 0:
            if math.isfinite(loss) and loss < 1e12:
                margins = StabilityMargins(step=step, loss=loss, sharpness=sharpness(u, v))
            else:
                margins = StabilityMargins(step=step, failure="not finite: the loss is inf")
                decisions.append(law(LRMeasured(margins, UpdateRule(lr=lr), target), state)[0])
                break
            decision, state = law(LRMeasured(margins, UpdateRule(lr=lr), target, **bounds), state)
            decisions.append(decision)
            lr = decision.new
    return sharpness(u, v), (u * v - 1) ** 2 / 2, lr, decisions


@pytest.mark.parametrize("goal", [20.0, 8.0, 4.0])
@pytest.mark.parametrize("every", [1, 50])
def test_the_staircase_reaches_flatter_minima(goal: float, every: int) -> None:
    """Catches a law that diverges, does not move, or ends sharper than asked."""
    target = TargetRegion(sharpness=(0, goal))
    a, loss, lr, _ = descend(gated_staircase, target, 1500, lr=0.06, every=every)
    assert lr == pytest.approx(2 / goal, rel=1e-12)
    assert loss < 1e-6
    # An escape of this loss, without progressive sharpening, may end below the edge, not above.
    assert 0.6 * goal < a < 1.001 * goal


def jump(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    return measured.decide("raise", measured.target.lr_for(measured.rule), "at once"), state


def follow(measured: LRMeasured, state: State, *, share: float) -> tuple[Decision, State]:
    assert measured.margins.sharpness is not None
    return measured.decide("lower", 2 * share / measured.margins.sharpness, "measured"), state


def cut_while_sharp(measured: LRMeasured, state: State) -> tuple[Decision, State]:
    high = measured.target.sharpness[1]
    assert measured.margins.sharpness is not None
    assert high is not None
    factor = 0.9 if measured.margins.sharpness > high else 1.0
    return measured.decide("cut", factor * measured.lr, "too sharp"), state


def test_a_jump_diverges_where_the_staircase_does_not() -> None:
    """Catches a staircase whose gate does nothing: at 4 the jump's lr a/2 is 6.3."""
    target = TargetRegion(sharpness=(0, 4.0))
    assert descend(jump, target, 100, lr=0.06)[3][-1].why == "at once"
    assert not descend(jump, target, 100, lr=0.06)[1] < 1e6
    assert descend(gated_staircase, target, 1500, lr=0.06)[1] < 1e-6


def test_cutting_while_it_is_too_sharp_freezes_the_sharp_minimum() -> None:
    """Catches a law that lowers the rate to get flatter: everything is stable at rate zero."""
    target = TargetRegion(sharpness=(0, 10.0))
    a, _, lr, _ = descend(cut_while_sharp, target, 500, lr=0.06)
    assert lr < 1e-20
    assert a == pytest.approx(SHARP, rel=0.01)  # the start is 1e-4 off the minimum


def test_following_the_measurement_leads_nowhere() -> None:
    """Catches a rate taken from the measured sharpness: it keeps any sharpness."""
    target = TargetRegion(sharpness=(0, 10.0))
    a, _, lr, _ = descend(partial(follow, share=0.8), target, 1500, lr=0.06)
    assert a == pytest.approx(SHARP, rel=0.01)
    assert lr == pytest.approx(1.6 / SHARP, rel=0.01)


# -- the staircase, decision by decision -----------------------------------------------------------

TARGET = TargetRegion(sharpness=(0, 10.0))  # rate 0.2


def measured_at(
    lr: float,
    a: float | None = 20.0,
    *,
    step: int = 10,
    target: TargetRegion = TARGET,
    **more: float,
) -> LRMeasured:
    margins = StabilityMargins(step=step, sharpness=a, loss=0.01)
    return LRMeasured(margins, UpdateRule(lr=lr), target, **more)


def failed(lr: float, why: str, *, step: int = 10) -> LRMeasured:
    return LRMeasured(StabilityMargins(step=step, failure=why), UpdateRule(lr=lr), TARGET)


def test_it_rises_a_percent_a_step_also_between_rare_measurements() -> None:
    """Catches a rate limit that counts measurements instead of steps."""
    first, state = gated_staircase(measured_at(0.1), new_state())
    assert (first.kind, first.new) == ("raise", pytest.approx(0.101, rel=1e-12))
    second, _ = gated_staircase(measured_at(0.1, step=15), state)
    assert second.new == pytest.approx(0.1 * 1.01**5, rel=1e-12)


def test_the_gate_bounds_the_ratio() -> None:
    """Catches a rise through the gate, and one while an escape is under way."""
    state = {"step": 0.0}
    decision, _ = gated_staircase(measured_at(0.1, step=1000), state, gate=1.2)
    # 1.01^1000 would be far above: the rate at which 20 is 1.2 of its limit.
    assert decision.new == pytest.approx(2 * 1.2 / 20.0, rel=1e-12)
    held, _ = gated_staircase(measured_at(0.1, a=25.0, step=1000), state, gate=1.2)
    assert (held.kind, held.new) == ("hold", 0.1)
    assert "not below the gate 1.2: waiting for the escape" in held.why


def test_it_goes_to_the_target_and_not_beyond() -> None:
    """Catches an overshoot in either direction, and a rate that moves after it has reached its goal."""
    state = {"step": 0.0}
    assert gated_staircase(measured_at(0.199, 9.0), state)[0].new == pytest.approx(0.2, rel=1e-12)
    exact = TargetRegion(sharpness=(10.0, 10.0))
    assert gated_staircase(measured_at(0.2005, 9.0, target=exact), state)[0].new == 0.2
    kept, _ = gated_staircase(measured_at(0.2, 50.0), state)
    assert (kept.kind, kept.new) == ("keep", 0.2)
    sharper = TargetRegion(sharpness=(10.0, None))
    lowered, _ = gated_staircase(measured_at(0.4, 4.0, target=sharper), state)
    assert (lowered.kind, lowered.new) == ("lower", pytest.approx(0.4 * 0.99**10, rel=1e-12))


def test_a_rate_that_forbids_more_than_it_must_is_left_alone() -> None:
    """Catches a rate lowered at a flat minimum: the target's 10 is an upper bound, not a goal."""
    kept, _ = gated_staircase(measured_at(0.4, 4.0), {"step": 0.0})
    assert (kept.kind, kept.new) == ("keep", 0.4)
    between = TargetRegion(sharpness=(4.0, 10.0))
    assert gated_staircase(measured_at(0.4, 4.5, target=between), {"step": 0.0})[0].kind == "keep"
    assert gated_staircase(measured_at(0.4, 3.9, target=between), {"step": 0.0})[0].kind == "lower"
    # What the rate allows is below the bound, though the present point is not.
    assert gated_staircase(measured_at(0.6, 4.5, target=between), {"step": 0.0})[0].kind == "lower"


def test_bounds_of_the_rate_hold() -> None:
    """Catches a bound checked only when the rate rises, or that moves a rate that should stay."""
    state = {"step": 0.0}
    assert gated_staircase(measured_at(0.1, 9.0, step=99, max_lr=0.12), state)[0].new == 0.12
    assert gated_staircase(measured_at(0.12, 9.0, max_lr=0.12), state)[0].kind == "keep"
    sharper = TargetRegion(sharpness=(10.0, None))
    lowered, _ = gated_staircase(
        measured_at(0.5, 1.0, step=999, min_lr=0.45, target=sharper), state
    )
    assert lowered.new == 0.45
    outside, _ = gated_staircase(measured_at(0.1, a=None, max_lr=0.05), state)
    assert (outside.kind, outside.new) == ("lower", 0.05)
    assert "max_lr=0.05" in outside.why


losses = st.sampled_from([0.1, 0.9, 1.1, 50.0])
sharpnesses = st.one_of(st.none(), st.floats(0.01, 1e3))
failures = st.sampled_from([None, None, None, "not finite: the loss is nan", "RuntimeError: x"])


@given(
    lr=st.floats(1e-4, 10.0),
    bounds=st.tuples(st.floats(1e-3, 1.0), st.floats(1e-3, 1.0)).map(sorted),
    measured=st.lists(st.tuples(losses, sharpnesses, failures, st.integers(1, 30)), max_size=30),
    target=st.sampled_from(
        [
            TargetRegion(sharpness=(0, 5.0)),
            TargetRegion(sharpness=(5.0, 8.0)),
            TargetRegion(sharpness=(50.0, None)),
            TargetRegion.within_limits(0.7),
        ]
    ),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_rates_stay_within_their_bounds_and_cuts_never_raise(
    lr: float, bounds: list[float], measured: list[Any], target: TargetRegion, momentum: float
) -> None:
    """Catches a decision outside of the bounds: a cut, a raise, or a rate that is kept."""
    law = gated_staircase if target.share is None else keep_margin
    low, high = bounds
    state, step = new_state(), 0
    for loss, a, failure, passed in measured:
        step += passed
        margins = StabilityMargins(step=step, loss=loss, sharpness=a, failure=failure)
        rule = UpdateRule(lr=lr, momentum=momentum)
        decision, state = law(LRMeasured(margins, rule, target, low, high, loss_cap=1.0), state)
        assert low <= decision.new <= high
        assert decision.old == lr
        assert decision.kind not in ("cut", "lower") or decision.new <= lr
        assert decision.kind != "raise" or decision.new >= lr
        assert decision.kind not in ("keep", "hold") or decision.new == lr
        lr = decision.new


def test_three_cuts_end_the_climb() -> None:
    """Catches a cycle of climbs and cuts. The loss a w^2 / 2 with a = 2 is stable up to a rate of 1,
    and the target asks for 2.
    """
    target, lr, w, state = TargetRegion(sharpness=(0, 1.0)), 0.5, 1.0, new_state()
    decisions = []
    for step in range(1, 6001):
        w = (1 - 2 * lr) * w + 1e-3 * (-1) ** step
        margins = StabilityMargins(step=step, sharpness=2.0, loss=w * w)
        measured = LRMeasured(margins, UpdateRule(lr=lr), target, loss_cap=4.0)
        decision, state = gated_staircase(measured, state)
        decisions.append(decision)
        lr = decision.new
    cuts = [decision for decision in decisions if decision.kind == "cut"]
    assert len(cuts) == 3
    # Each attempt is gentler: the gate's distance from 1 is halved. At a = 2 the limit is 1.
    assert [cut.old for cut in cuts] == pytest.approx([1.2, 1.1, 1.05], rel=1e-9)
    assert lr == cuts[-1].new == pytest.approx(0.7 * 1.05, rel=1e-9)
    assert not any(decision.changes for decision in decisions[cuts[-1].step :])
    assert "cut 3 times: it stays at the last one that held" in decisions[-1].why
    # Rates that have held the target for long are evidence that the failures are past.
    held = {"step": 0.0, "cuts": 3.0}
    for step, cuts_left in ((10, 3.0), (1009, 3.0), (1010, None)):
        _, held = gated_staircase(measured_at(0.2, 9.0, step=step), held)
        assert held.get("cuts") == cuts_left


def test_a_margin_does_not_rise_after_three_cuts() -> None:
    """Catches a cycle of climbs and cuts in the margin law; here half of the limit is unstable."""
    lr, state, kinds = 0.1, new_state(), []
    for step in range(0, 20_000, 10):
        margins = StabilityMargins(step=step, sharpness=5.0, loss=9.0 if lr > 0.15 else 0.1)
        rule = UpdateRule(lr=lr)
        measured = LRMeasured(margins, rule, HALF, min_lr=0.01, max_lr=1.0, loss_cap=1.0)
        decision, state = keep_margin(measured, state)
        kinds.append(decision.kind)
        lr = decision.new
    assert kinds.count("cut") == 3
    assert kinds[-1] == "hold"


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_escape_at_the_momentum_gate_grows_as_without_momentum(nesterov: bool) -> None:
    """Catches a wrong gate; the oracle is the iteration on a parabola."""
    rule = UpdateRule(lr=0.1, momentum=0.9, nesterov=nesterov)
    a = momentum_gate(rule, 1.2) * rule.max_sharpness
    w, m = 1.0, 0.0
    for _ in range(200):
        former = w
        m = 0.9 * m + a * w
        w -= 0.1 * (a * w + 0.9 * m if nesterov else m)
    assert w / former == pytest.approx(-(2 * 1.2 - 1), rel=1e-9)
    assert momentum_gate(UpdateRule(lr=0.1), 1.3) == 1.3


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("lr", [0.05, 0.12])
def test_stored_momentum_does_not_make_the_toy_diverge(lr: float, every: int) -> None:
    """Catches a gate for gradient descent: with momentum 0.9 a third of these runs diverged."""
    target, lr_goal = TargetRegion(sharpness=(0, 4.0)), 0.95
    for seed in range(3):
        u, v, mu, mv, state = 4.981 + 1e-3 * seed, 1 / 4.98, 0.0, 0.0, new_state()
        rate = lr
        for step in range(1, 801):
            error = u * v - 1
            mu, mv = 0.9 * mu + error * v, 0.9 * mv + error * u
            u, v = u - rate * mu, v - rate * mv
            if step % every == 0:
                loss = (u * v - 1) ** 2 / 2
                margins = StabilityMargins(step=step, loss=loss, sharpness=sharpness(u, v))
                rule = UpdateRule(lr=rate, momentum=0.9)
                decision, state = gated_staircase(
                    LRMeasured(margins, rule, target, loss_cap=5.0), state
                )
                assert decision.kind != "cut"
                rate = decision.new
        assert rate == pytest.approx(lr_goal, rel=1e-12)
        assert sharpness(u, v) < 4.0


def test_momentum_is_waited_for() -> None:
    """Catches a rise while the momentum of an escape still moves the weights."""

    def with_momentum(a: float, step: int) -> LRMeasured:
        margins = StabilityMargins(step=step, sharpness=a, loss=0.01)
        return LRMeasured(margins, UpdateRule(lr=0.1, momentum=0.9), TARGET)

    _, state = gated_staircase(with_momentum(38.1, 10), new_state())  # the limit is 38
    for step, kind in ((11, "hold"), (18, "hold"), (20, "raise")):
        decision, state = gated_staircase(with_momentum(30.0, step), state)
        assert decision.kind == kind


def test_a_lost_loss_is_cut_once_and_held() -> None:
    """Catches a cut at every measurement: lost weights stay lost, and the rate would fall to zero."""
    lost = "not finite: the loss is nan"
    decision, state = gated_staircase(failed(0.1, lost), new_state(), hold=10)
    assert (decision.kind, decision.new) == ("cut", pytest.approx(0.07))
    for step in (11, 20, 500):
        again, state = gated_staircase(failed(0.07, lost, step=step), state, hold=10)
        assert (again.kind, again.new) == ("hold", 0.07)
    # With restored weights it may rise again, and be lost again.
    _, state = gated_staircase(measured_at(0.07, step=510), state)
    assert gated_staircase(failed(0.07, lost, step=520), state)[0].kind == "cut"


def test_a_loss_above_the_cap_is_cut_again_after_the_hold() -> None:
    """Catches a cap that is relative to an earlier loss, and a cut that is undone at once."""
    high = LRMeasured(
        StabilityMargins(step=10, sharpness=1.0, loss=0.3), UpdateRule(lr=0.1), TARGET, loss_cap=0.2
    )
    decision, state = gated_staircase(high, new_state(), hold=10)
    assert decision.kind == "cut"
    assert "the loss 0.3 is above its cap 0.2" in decision.why
    # Back below the cap, but within the hold.
    assert gated_staircase(measured_at(0.07, 9.0, step=19), state)[0].kind == "hold"
    assert gated_staircase(measured_at(0.07, 9.0, step=20), state)[0].kind == "raise"
    later = LRMeasured(
        StabilityMargins(step=20, sharpness=1.0, loss=0.3),
        UpdateRule(lr=0.07),
        TARGET,
        loss_cap=0.2,
    )
    assert gated_staircase(later, state)[0].kind == "cut"


def test_a_rise_of_the_loss_below_the_cap_is_no_reason_to_cut() -> None:
    """Catches a cut on a relative rise, which would cancel the escape that is wanted."""
    _, state = gated_staircase(measured_at(0.1), new_state())
    margins = StabilityMargins(step=11, sharpness=19.0, loss=10.0)
    assert (
        gated_staircase(LRMeasured(margins, UpdateRule(lr=0.1), TARGET), state)[0].kind == "raise"
    )


def test_what_was_not_measured_raises_nothing() -> None:
    """Catches a rise after a search that did not converge, and a cut after an unrelated error.

    A Ritz value that has not converged is too low, so the rate would seem to have room.
    """
    poor = Measurement(15.0, 0.5, 50, converged=False)
    margins = StabilityMargins(step=5, sharpness=15.0, measurements={"sharpness": poor})
    for law, target in ((gated_staircase, TARGET), (keep_margin, TargetRegion.within_limits(0.9))):
        measured = LRMeasured(margins, UpdateRule(lr=0.1), target, min_lr=0.01)
        decision, _ = law(measured, new_state())
        assert (decision.kind, decision.new) == ("hold", 0.1)
        assert "did not converge" in decision.why
    error, _ = gated_staircase(failed(0.1, "RuntimeError: out of memory"), new_state())
    assert (error.kind, error.new) == ("hold", 0.1)
    assert "out of memory" in error.why


def test_laws_are_pure() -> None:
    """Catches a law that changes its state in place, which a dry run must not do."""
    state: State = {"step": 3.0, "held_until": 0.0, "other": 7.0}
    before = dict(state)
    for law, target in ((gated_staircase, TARGET), (keep_margin, TargetRegion.within_limits(0.5))):
        for margins in (
            StabilityMargins(step=5, sharpness=15.0),
            StabilityMargins(step=5, failure="not finite: x"),
        ):
            measured = LRMeasured(margins, UpdateRule(lr=0.1), target, min_lr=0.01)
            first, after = law(measured, state)
            assert state == before
            assert law(measured, state) == (first, after)
            assert after["other"] == 7.0  # kept there by a scheduler


def test_a_counter_that_went_back_ends_all_waits() -> None:
    """Catches a hold until a step of the old counter, which is now far in the future."""
    for name in ("held_until", "escaping", "arrived"):
        state = {"step": 50_000.0, name: 50_010.0}
        decision, after = gated_staircase(measured_at(0.1, step=10), state)
        assert decision.kind == "raise"
        assert name not in after


@pytest.mark.parametrize("law", [gated_staircase, keep_margin])
def test_a_measurement_after_a_very_long_time_raises_to_the_goal(law: Law) -> None:
    """Catches an overflow of the growth factor raised to a very large number of steps."""
    target = TARGET if law is gated_staircase else TargetRegion.within_limits(0.8)
    margins = StabilityMargins(step=1_000_000, sharpness=1.0, loss=0.01)
    measured = LRMeasured(margins, UpdateRule(lr=0.01), target, min_lr=1e-3, max_lr=0.02)
    assert law(measured, {"step": 0.0})[0].new == 0.02


def test_a_first_call_and_a_counter_that_went_back_count_one_step() -> None:
    """Catches a jump of the rate in a resumed run whose monitor started from zero."""
    for state in (new_state(), {"step": 5000.0}):
        decision, _ = gated_staircase(measured_at(0.1, step=10), state)
        assert decision.new == pytest.approx(0.101, rel=1e-12)


# -- the margin ------------------------------------------------------------------------------------

HALF = TargetRegion.within_limits(0.5)


def sharpening(law: Callable[[LRMeasured], Decision], steps: int) -> tuple[float, float]:
    """Return the final sharpness and rate; the sharpness rises by 2 % a step, up to 2/lr."""
    a, lr = 5.0, 0.1
    for step in range(1, steps + 1):
        a = min(1.02 * a, 2 / lr)
        margins = StabilityMargins(step=step, sharpness=a)
        lr = law(LRMeasured(margins, UpdateRule(lr=lr), HALF, min_lr=0.02, max_lr=0.1)).new
    return a, lr


def test_a_shrinking_rate_stops_at_its_floor() -> None:
    """Catches a rate lowered without end to keep the margin: the sharpness rises as the rate falls."""
    a, lr = sharpening(lambda measured: follow(measured, {}, share=0.5)[0], 300)
    # `decide` keeps the bounds; without them the rate would be 2 * 0.5 / a, and a without end.
    assert lr == 0.02
    state: dict[str, float] = {}

    def law(measured: LRMeasured) -> Decision:
        nonlocal state
        decision, after = keep_margin(measured, state)
        state = dict(after)
        return decision

    a, lr = sharpening(law, 1000)
    assert (a, lr) == (pytest.approx(100.0), 0.02)
    floor, _ = keep_margin(measured_at(0.02, 80.0, target=HALF, min_lr=0.02), {})
    assert (floor.kind, floor.new) == ("hold", 0.02)
    assert "at its floor" in floor.why
    with pytest.raises(ValueError, match=r"min_lr=0\.0: expected a positive floor"):
        keep_margin(measured_at(0.1, target=HALF), {})
    with pytest.raises(ValueError, match=r"needs TargetRegion\.within_limits"):
        keep_margin(measured_at(0.1, min_lr=0.01), {})


def test_the_margin_has_hysteresis() -> None:
    """Catches a rate that goes up and down around a single threshold."""
    bounds = {"target": HALF, "min_lr": 0.01, "max_lr": 1.0}
    assert keep_margin(measured_at(0.1, 10.2, **bounds), {})[0].kind == "lower"
    assert keep_margin(measured_at(0.1, 9.5, **bounds), {})[0].kind == "keep"
    rising, _ = keep_margin(measured_at(0.1, 5.0, **bounds), {})
    assert (rising.kind, rising.new) == ("raise", pytest.approx(0.101))
    # It lowers to the share, and rises to below it.
    down, _ = keep_margin(measured_at(0.1, 10.2, step=99, **bounds), {"step": 0.0})
    assert down.new == pytest.approx(1 / 10.2)
    # Slowly while it is stable, at once where it is not.
    assert keep_margin(measured_at(0.1, 19.0, **bounds), {})[0].new == pytest.approx(0.099)
    assert keep_margin(measured_at(0.1, 21.0, **bounds), {})[0].new == pytest.approx(1 / 21)
    up, _ = keep_margin(measured_at(0.1, 8.0, step=99, **bounds), {"step": 0.0})
    assert up.new == pytest.approx(0.45 * 2 / 8.0)


@pytest.mark.parametrize("a", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("lr", [20.0, 30.0])
def test_no_law_raises_a_rate_that_decay_alone_makes_unstable(lr: float, a: float) -> None:
    """Catches a negative ratio taken for a small one: from a rate of 20 up the limit is 0 or less."""
    rule, target = UpdateRule(lr=lr, weight_decay=0.1), TargetRegion(sharpness=(0, 5.0))
    margins = StabilityMargins(step=1, sharpness=a)
    share = LRMeasured(margins, rule, HALF, min_lr=0.01)
    assert share.ratio == math.inf
    lowered, _ = keep_margin(share, {})
    assert lowered.kind == "lower"
    # 2/lr - 0.1 is twice the sharpness at lr = 2/2.1; without a positive sharpness no rate is known.
    assert lowered.new == pytest.approx(2 / 2.1 if a > 0 else 0.99 * lr)
    assert gated_staircase(LRMeasured(margins, rule, target), {})[0].kind == "lower"
