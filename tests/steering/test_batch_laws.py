"""The laws of the batch size and the verdicts, without a network."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from stableopt import StabilityMargins, TargetRegion, UpdateRule
from stableopt.stability import Measurement
from stableopt.steering.batch_laws import BatchMeasured, batch_staircase, keep_batch_margin
from stableopt.steering.decision import Decision, marks
from stableopt.steering.law_state import State
from stableopt.steering.target_status import Situation, target_status

RULES = {"band": 0.1, "patience": 20}
UNIFORM = TargetRegion(non_uniformity=(2.0, 4.0))  # at 0.5 and n = 1000 the box forbids by B = 3


def measured_at(s: float | None, batch_size: int, *, step: int = 10, **more: Any) -> BatchMeasured:
    margins = StabilityMargins(step=step, non_uniformity=s, loss=more.pop("loss", 0.01))
    target = more.pop("target", UNIFORM)
    return BatchMeasured(margins, UpdateRule(lr=0.5), target, batch_size, 1000, **more)


def averaged(s: float, **more: float) -> State:
    """Return the state after so many measurements of ``s`` that no more is gained by averaging."""
    return {"mean": s, "count": 16.0, **more}


def test_it_goes_down_by_halves_to_what_the_box_forbids() -> None:
    """Catches a jump straight to the smallest batch, and a descent that stops above the box's size."""
    size, sizes, step, state = 64, [], 0, {}
    while size > 3:
        decision, state = batch_staircase(
            measured_at(4.5, size, step=step), state, gate=1.5, dwell=10
        )
        size, step = int(decision.new), step + 10
        sizes += [size] if decision.changes else []
    assert sizes == [32, 16, 8, 4, 3]


def test_it_goes_on_below_the_box_while_the_non_uniformity_stays() -> None:
    """Catches a law that stops at the box's batch size although the non-uniformity is still too high."""
    decision, state = batch_staircase(measured_at(4.21, 3, step=200), averaged(4.21), gate=1.5)
    assert (decision.kind, decision.new) == ("lower", 2)  # its limit is 2.83
    assert "mean" not in state  # the next average has measurements at the new size only
    decision, _ = batch_staircase(
        measured_at(4.21, 2, step=300), {**state, **averaged(4.21)}, gate=3.0
    )
    assert decision.new == 1
    decision, _ = batch_staircase(measured_at(6.0, 1, step=400), state)
    assert (decision.kind, decision.new) == ("hold", 1)
    assert "no smaller batch" in decision.why


def test_the_gate_keeps_the_noise_from_scattering_the_weights() -> None:
    """Catches a batch so small that training diverges: the ratio to the limit is bounded."""
    for s, gate in ((6.0, 1.5), (20.0, 1.5), (6.0, 1.2)):
        size, state, step = 64, {}, 0
        for _ in range(20):
            decision, state = batch_staircase(
                measured_at(s, size, step=step), state, gate=gate, dwell=1
            )
            size, step = int(decision.new), step + 1
        assert decision.kind == "hold"
        assert decision.why.endswith("a smaller batch would pass the gate")
        assert s <= gate * measured_at(s, size).limit(size) * (1 + 1e-9)
        assert s > gate * measured_at(s, size).limit(size - 1)


def test_a_gate_that_holds_too_long_lets_the_next_size_pass() -> None:
    """Catches a law stuck at a batch of three, whose next size is 22 % further, beyond the gate.

    Also catches patience that leads beyond the last gate.
    """
    state = averaged(4.25)
    for step in (100, 200, 399):
        held, state = batch_staircase(measured_at(4.25, 3, step=step), state)
        assert (held.kind, held.new) == ("hold", 3)  # 4.25 is 1.5 of the limit at two
    assert batch_staircase(measured_at(4.25, 3, step=400), state)[0].kind == "hold"
    passed, after = batch_staircase(measured_at(4.25, 3, step=400), state, last_gate=1.6)
    assert (passed.kind, passed.new) == ("lower", 2)
    assert "held" not in after  # patience restarts


def test_it_waits_for_the_effect_of_a_change() -> None:
    """Catches a batch size that falls at every measurement, without ``dwell`` steps in between."""
    _, state = batch_staircase(measured_at(6.0, 64, step=10), {}, dwell=100)
    waiting, after = batch_staircase(measured_at(6.0, 32, step=109), state, dwell=100)
    assert (waiting.kind, waiting.new) == ("hold", 32)
    assert after == {**state, "step": 109}
    assert batch_staircase(measured_at(6.0, 32, step=110), state, dwell=100)[0].new == 16


@pytest.mark.parametrize(
    ("s", "kind"), [(4.19, "keep"), (4.21, "lower"), (1.91, "keep"), (1.89, "raise"), (3.0, "keep")]
)
def test_it_has_hysteresis(s: float, kind: str) -> None:
    """Catches bounds without hysteresis: the batch size would go up and down around them."""
    decision, _ = batch_staircase(measured_at(s, 16), averaged(s))
    assert decision.kind == kind
    assert decision.new == {"keep": 16, "lower": 8, "raise": 32}[kind]


@pytest.mark.parametrize(("s", "kind"), [(4.79, "keep"), (4.81, "lower"), (1.61, "keep")])
def test_one_measurement_decides_only_if_it_is_far_off(s: float, kind: str) -> None:
    """Catches a law that acts on one noisy measurement, and a law that always waits for sixteen."""
    decision, after = batch_staircase(measured_at(s, 16), {})
    assert decision.kind == kind
    assert ("count" in after) == (kind == "keep")


@pytest.mark.parametrize("share", [0.95, 0.99])
def test_noise_does_not_lower_the_batch_again_and_again(share: float) -> None:
    """Catches a size that falls whenever noise of 10 % exceeds the bound: nothing raises it again."""
    for law, target in (
        (batch_staircase, TargetRegion(non_uniformity=(0, 50.0))),
        (keep_batch_margin, TargetRegion.within_limits(0.5)),
    ):
        rule, n = UpdateRule(lr=0.1), 10_000
        s = share * (50.0 if law is batch_staircase else 0.5 * rule.max_non_uniformity(64, n))
        for seed in range(5):
            generator, size, state = random.Random(seed), 64, {}
            for step in range(0, 5000, 25):
                noisy = s * generator.uniform(0.9, 1.1)
                margins = StabilityMargins(step=step, non_uniformity=noisy, loss=0.1)
                decision, state = law(BatchMeasured(margins, rule, target, size, n), state)
                size = int(decision.new)
            assert size == 64


def test_a_change_that_noise_hides_is_still_made() -> None:
    """Catches averages so long that the batch size never changes; s is 10 % above the bound here."""
    for seed in range(5):
        generator, state, step = random.Random(seed), {}, 0
        decision = None
        while decision is None or not decision.changes:
            step += 25
            noisy = 4.4 * generator.uniform(0.9, 1.1)
            decision, state = batch_staircase(measured_at(noisy, 16, step=step), state)
        assert decision.new == 8
        assert step <= 16 * 25


def test_a_batch_that_diverged_three_times_is_not_lowered_again() -> None:
    """Catches a cycle: the target asks for a smaller batch, which diverges, again and again."""
    size, state, sizes = 16, {}, []
    for step in range(0, 4000, 10):
        diverges = size < 16
        measured = measured_at(5.5, size, step=step, loss=9.0 if diverges else 0.1, loss_cap=1.0)
        decision, state = batch_staircase(measured, state, gate=3.0)
        size = int(decision.new)
        sizes += [size] if decision.changes else []
    assert sizes == [8, 16] * 3
    assert "smaller batches diverged 3 times" in decision.why


def test_a_lost_loss_asks_for_less_noise_once() -> None:
    """Catches a smaller batch after a divergence, and a larger one at every step after it."""
    decision, state = batch_staircase(measured_at(6.0, 16, loss=9.0, loss_cap=1.0), {}, dwell=50)
    assert (decision.kind, decision.new) == ("raise", 32)
    again, _ = batch_staircase(
        measured_at(6.0, 32, loss=9.0, loss_cap=1.0, step=11), state, dwell=50
    )
    assert (again.kind, again.new) == ("hold", 32)
    margins = StabilityMargins(step=10, failure="not finite: the loss is nan")
    lost = BatchMeasured(margins, UpdateRule(lr=0.5), UNIFORM, 16, 1000)
    assert batch_staircase(lost, {})[0].new == 32


def test_what_was_not_measured_changes_nothing() -> None:
    """Catches a failure taken for a non-uniformity of zero."""
    poor = Measurement(9.0, 0.5, 50, converged=False)
    for margins, says in (
        (StabilityMargins(step=9), "not measured"),
        (StabilityMargins(step=9, failure="RuntimeError: memory"), "memory"),
        (
            StabilityMargins(step=9, non_uniformity=9.0, measurements={"non_uniformity": poor}),
            "did not converge",
        ),
    ):
        for law, target in (
            (batch_staircase, UNIFORM),
            (keep_batch_margin, TargetRegion.within_limits(0.5)),
        ):
            decision, state = law(BatchMeasured(margins, UpdateRule(lr=0.5), target, 16, 1000), {})
            assert (decision.kind, decision.new, state) == ("hold", 16, {"step": 9})
            assert says in decision.why


def test_sizes_stay_within_what_is_allowed() -> None:
    """Catches a batch larger than the data set, and a bound that moves a size that should stay."""
    assert batch_staircase(measured_at(5.0, 16, smallest=12), {})[0].new == 12
    assert batch_staircase(measured_at(1.0, 800), {})[0].new == 1000
    assert batch_staircase(measured_at(1.0, 20, largest=24), {})[0].new == 24
    assert batch_staircase(measured_at(3.0, 16, smallest=32), {})[0].new == 16


def test_a_margin_raises_the_batch_until_the_share_is_kept() -> None:
    """Catches a share of the wrong limit; the oracle is the limit itself."""
    target = TargetRegion.within_limits(0.5)
    decision, state = keep_batch_margin(measured_at(4.0, 4, target=target), {}, dwell=10)
    size, rule = int(decision.new), UpdateRule(lr=0.5)
    assert 0.5 * rule.max_non_uniformity(size, 1000) >= 4.0
    assert 0.5 * rule.max_non_uniformity(size - 1, 1000) < 4.0
    held, _ = keep_batch_margin(measured_at(4.5, size, target=target, step=19), state)
    assert held.kind == "hold"
    assert keep_batch_margin(measured_at(1.0, size, target=target), {})[0].kind == "keep"
    with pytest.raises(ValueError, match="needs TargetRegion"):
        keep_batch_margin(measured_at(4.0, 4), {})


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_change_nothing(value: float) -> None:
    """Catches a batch size that rises on a NaN, which then stays in the average."""
    share = TargetRegion.within_limits(0.5)
    for law, target in ((batch_staircase, UNIFORM), (keep_batch_margin, share)):
        decision, state = law(measured_at(value, 8, target=target), {})
        assert (decision.kind, decision.new) == ("hold", 8)
        assert "mean" not in state
    lost, _ = batch_staircase(measured_at(1.0, 8, loss=value), {})
    assert (lost.kind, lost.new) == ("raise", 16)


def test_a_bound_that_prevents_a_change_is_said() -> None:
    """Catches a decision to raise a batch size that is the largest already."""
    for size, options in ((1000, {}), (64, {"largest": 64})):
        measured = measured_at(1.0, size, **options)
        decision, _ = batch_staircase(measured, averaged(1.0))
        assert (decision.kind, decision.new) == ("hold", size)
        assert decision.why.endswith("below the target's 2; no larger batch is allowed")
        diverged, _ = batch_staircase(replace(measured, loss_cap=1e-3), {})
        assert (diverged.kind, diverged.new) == ("hold", size)
    above = measured_at(1.0, 100, largest=64)  # the bound is below the present size
    assert above.decide("raise", 200, "").kind == "lower"


def test_a_step_counter_that_went_back_does_not_block_the_law() -> None:
    """Catches a wait until a step of the run before the checkpoint was lost."""
    old: State = {**averaged(6.0), "step": 90_000.0, "until": 90_100.0, "held": 90_000.0}
    decision, state = batch_staircase(measured_at(6.0, 64, step=10), old)
    assert (decision.kind, decision.new) == ("lower", 32)
    assert state["until"] == 110
    share = measured_at(6.0, 4, step=10, target=TargetRegion.within_limits(0.5))
    decision, _ = keep_batch_margin(share, old)
    assert decision.kind == "raise"


# -- verdicts --------------------------------------------------------------------------------------


def judge(values: list[float], target: TargetRegion, **more: Any) -> list[Decision]:
    """Return the verdicts on successive sharpnesses, at the target's rate unless ``lr=`` is given."""
    state: State = {}
    verdicts = []
    more = {"lr": 0.5, "target_lr": 0.5, **more}
    patience = more.pop("patience", 5)
    for step, a in enumerate(values):
        margins = StabilityMargins(step=step, sharpness=a, non_uniformity=a, loss=2e-4)
        decision, state = target_status(
            Situation(margins, target, **more), state, band=0.05, patience=patience
        )
        verdicts += [] if decision is None else [decision]
    return verdicts


def test_a_target_is_reached_once_and_missed_only_at_twice_the_band() -> None:
    """Catches a verdict at each measurement near the edge, where training hovers."""
    target = TargetRegion(sharpness=(0, 4.0))
    verdicts = judge([6.0, 4.21, 4.19, 4.3, 3.9, 4.35, 4.39, 4.41, 4.3, 4.1], target)
    assert [(d.step, d.kind) for d in verdicts] == [(2, "reached"), (7, "missed"), (9, "reached")]


def test_a_sharper_target_that_nothing_leads_to_is_said_to_be_so() -> None:
    """Catches no verdict, or one with another reason, where progressive sharpening has ended."""
    target = TargetRegion(sharpness=(50.0, None))
    verdicts = judge([10.0, 11.0, 12.0, *[12.01] * 9], target)
    assert [(d.kind, d.step) for d in verdicts] == [("unreachable", 7)]
    why = "target sharpness 50 is above what the loss left to descend 0.0002 can produce"
    assert verdicts[0].why.startswith(why)
    # As long as it sharpens, or the rate is on its way, there is hope.
    assert judge([10 * 1.05**k for k in range(30)], target) == []
    assert judge([12.0] * 30, target, lr=0.4) == []


def test_a_rate_that_is_not_allowed_is_named() -> None:
    """Catches a user's bound on the rate that silently makes the target unreachable."""
    target = TargetRegion(sharpness=(0, 4.0))
    (first, *_) = judge([6.0] * 3, target, lr=0.3, max_lr=0.3)
    assert "takes a rate of 0.5, above max_lr=0.3" in first.why
    assert judge([6.0] * 3, target, lr=0.2, max_lr=0.3) == []


def test_a_rate_that_had_to_be_cut_again_and_again_is_given_up() -> None:
    """Catches endless divergences towards a target that is flatter than the network can be."""
    target = TargetRegion(sharpness=(0, 4.0))
    assert judge([6.0] * 3, target, lr=0.3, cuts=2) == []
    (first, *_) = judge([6.0] * 3, target, lr=0.3, cuts=3)
    assert first.kind == "unreachable"
    assert "cut 3 times" in first.why


def test_the_smallest_batch_is_named() -> None:
    """Catches a run at the smallest batch size that waits without a verdict."""
    verdicts = judge([6.0] * 9, UNIFORM, target_lr=None, batch_size=2, smallest=2)
    assert "above 4, and no smaller batch than 2 is allowed" in verdicts[0].why
    verdicts = judge([6.0] * 9, UNIFORM, target_lr=None, batch_size=5, smallest=2)
    assert "has hardly come closer" in verdicts[0].why


def test_a_verdict_has_the_number_of_the_quantity_that_it_is_about() -> None:
    """Catches the sharpness as the value of a missed non-uniformity, and its floor as the reason."""
    margins = StabilityMargins(step=9, sharpness=1.5, non_uniformity=6.0)
    both = TargetRegion(sharpness=(0, 4.0), non_uniformity=(0, 4.0))
    for target in (UNIFORM, both):
        situation = Situation(margins, target, lr=0.5)
        stuck, _ = target_status(situation, {"best": 0.0}, band=0.1, patience=1)
        again, _ = target_status(situation, {"reached": 1.0}, **RULES)
        cut, _ = target_status(replace(situation, cuts=3), {}, **RULES)
        for decision in (stuck, again, cut):
            assert decision is not None
            assert (decision.old, decision.new, decision.measured) == (6.0, 6.0, 6.0)
            assert "sharpness" not in str(decision)
    for target, value in ((TargetRegion(sharpness=(0, 4.0)), 1.5), (both, 1.5)):
        within = Situation(replace(margins, non_uniformity=2.0), target, lr=0.5)
        reached, _ = target_status(within, {}, **RULES)
        assert (reached.kind, reached.measured) == ("reached", value)
    reached, _ = target_status(
        Situation(replace(margins, non_uniformity=2.0), UNIFORM, lr=0.5), {}, **RULES
    )
    assert (reached.kind, reached.measured) == ("reached", 2.0)


def test_nothing_is_said_of_a_failed_measurement() -> None:
    """Catches a target that counts as reached by a failed measurement."""
    target = TargetRegion(sharpness=(0, 4.0))
    for margins in (
        StabilityMargins(failure="x"),
        StabilityMargins(
            sharpness=1.0,
            measurements={"sharpness": Measurement(1.0, 0.5, 9, converged=False)},
        ),
    ):
        assert target_status(Situation(margins, target, lr=0.5), {}, **RULES) == (None, {})


# -- decisions -------------------------------------------------------------------------------------


def test_decisions_are_records_and_words() -> None:
    """Catches numbers missing from the record, and a None in it, which sinks cannot take."""
    decision = Decision("batch_size", "lower", 64, 32, "s is above", 6.0, math.inf, step=7)
    assert decision.record() == {
        "decision": 1.0,
        "batch_size_from": 64.0,
        "batch_size_to": 32.0,
        "measured": 6.0,
        "limit": math.inf,
    }
    assert str(decision) == "step 7: lower batch_size 64 → 32: s is above"
    assert Decision.from_dict(decision.to_dict()) == decision
    kept = Decision("lr", "keep", 0.1, 0.1, "done", dry_run=True)
    assert str(kept) == "step 0: keep lr 0.1 (dry run): done"


def test_marks_show_where_a_kind_begins() -> None:
    """Catches a mark for each step of a staircase, which would hide the figure."""
    kinds = ["raise", "raise", "hold", "raise", "keep", "keep"]
    decisions = [Decision("lr", kind, 1, 2, "", step=t) for t, kind in enumerate(kinds)]
    decisions.insert(2, Decision("batch_size", "raise", 1, 2, "", step=1))
    assert marks(decisions) == [
        (0, "raise lr"),
        (1, "raise batch size"),
        (2, "hold lr"),
        (3, "raise lr"),
        (4, "keep lr"),
    ]
