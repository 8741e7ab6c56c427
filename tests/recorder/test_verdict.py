"""`verdict`: the likely cause of an alarm, by the evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from stableopt import StabilityMargins
from stableopt.recorder import Alarm, Evidence, StepRecord, Verdict, verdict
from stableopt.recorder.evidence import MeasuredRecord

ROSE = Alarm("loss", 60, "the loss rose from 0.1 to 3")


def step(number: int, lr: float = 0.1, norm: float = 1.0, **more: Any) -> StepRecord:
    return StepRecord(number, lr, 0.1, {"0": norm, "2": 0.1}, **more)


def measured_at(
    step: int,
    ratio: float,
    shares: dict[str, float] | None = None,
    *,
    batch_size: int | None = None,
) -> MeasuredRecord:
    margins = StabilityMargins(
        step=step,
        sharpness=20 * ratio,
        sharpness_limit=20.0,
        batch_size=batch_size,
    )
    return MeasuredRecord(margins, shares or {"2": 0.61, "0": 0.39})


def verdict_on(
    steps: list[StepRecord], measured: list[MeasuredRecord], gains: dict[str, float] | None = None
) -> Verdict:
    return verdict(ROSE, Evidence(steps, measured, 2.3, gains or {}))


CALM = [step(k, norm=1.0 + 0.1 * (k % 3)) for k in range(1, 61)]


def test_a_raised_learning_rate_comes_first() -> None:
    """Catches a layer blamed for an instability that a raised learning rate caused."""
    steps = [step(k, lr=0.1 if k < 50 else 0.12, norm=1.2 ** max(0, k - 50)) for k in range(1, 61)]
    result = verdict_on(steps, [measured_at(40, 0.9), measured_at(60, 1.1)])
    assert (result.cause, result.step) == ("learning rate", 50)
    assert result.text == (
        "The loss rose from 0.1 to 3. The learning rate rose from 0.1 to 0.12 at step 50. The"
        " sharpness crossed its limit and was 1.1 times its limit at step 60, 61% of it in 2."
    )


def test_a_rate_that_never_worked_is_blamed() -> None:
    """Catches a layer blamed for a constant learning rate that was too high from the first step."""
    steps = [replace(step(k, lr=20.0), loss=0.3 * 1.5**k) for k in range(1, 61)]
    measured = [measured_at(5, 90.0, {"0": 1.0}), measured_at(10, 300.0, {"0": 1.0})]
    result = verdict_on(steps, measured)
    assert (result.cause, result.step, result.layer) == ("learning rate", 1, "0")
    assert (
        "The learning rate was 20 at step 1, and most losses since then are more than twice the first"
        " one. The sharpness was 90 times its limit at step 5, 100% of it in 0. Gradients are clipped"
    ) in result.text
    # Weights that started large are blamed first, and the rate is mentioned.
    large = verdict_on(steps, measured, {"0": 30.0, "2": 1.0})
    assert large.cause == "layer"
    assert "The learning rate was 20 at step 1" in large.text
    # Training that worked before, or evidence without the first steps, has another cause.
    worked = [replace(each, loss=0.3 / k) for k, each in enumerate(steps, start=1)]
    calm = [replace(each, loss=1.0 + 0.2 * (-1) ** k) for k, each in enumerate(steps)]
    fell = [replace(each, lr=20.0 / (1 + k // 20)) for k, each in enumerate(steps)]
    silent = [replace(each, loss=None) if each.step == 1 else each for each in steps]
    for others in (worked, calm, fell, silent, steps[5:], steps[:3]):
        assert verdict_on(others, measured).cause == "layer"
    later = [measured_at(3, 0.9), *measured]
    assert verdict_on(steps, later).cause == "layer"


@pytest.mark.parametrize(
    ("norms", "layer", "place"),
    [
        ({"0": math.nan, "2": math.nan}, None, "it is not finite in any layer"),
        ({"0": 1.0, "2": math.inf}, "2", "it is not finite in 2"),
        ({"0": 50.0, "2": 1.0}, "0", "it is largest in 0"),
    ],
)
def test_a_gradient_that_is_not_finite_is_largest_nowhere(
    norms: dict[str, float], layer: str | None, place: str
) -> None:
    """Catches the first of several layers without a finite gradient called the largest."""
    steps = [replace(s, grad_norms=norms) if s.step == 50 else s for s in CALM]
    result = verdict_on(steps, [])
    assert (result.cause, result.step, result.layer) == ("batch", 50, layer)
    assert result.text.endswith(f"{place}.")
    assert "Clipping helps if their gradient is finite" in result.advice


def test_an_old_or_small_rise_is_not_blamed() -> None:
    """Catches a verdict that blames an early warm-up or a small rise for a later spike."""
    old = [step(k, lr=0.01 if k < 5 else 0.1) for k in range(1, 61)]
    assert verdict_on(old, []).cause == "unknown"
    slow = [step(k, lr=0.1 * 1.005**k) for k in range(1, 61)]
    assert verdict_on(slow, []).cause == "unknown"


def test_an_odd_batch_is_named_with_its_samples() -> None:
    """Catches a jump of the gradient that is missed, or assigned to another step."""
    steps = [*CALM[:54], step(55, norm=40.0, batch=[7, 3]), *CALM[55:]]
    result = verdict_on(steps, [measured_at(50, 1.1), measured_at(60, 3.0)])
    assert (result.cause, result.layer, result.step) == ("batch", "0", 55)
    assert "of the samples 7, 3 at step 55 was 40, where 1.1 was usual" in result.text


def test_a_gradient_that_grows_over_steps_is_no_odd_batch() -> None:
    """Catches a batch blamed for an instability that grows over several steps."""
    steps = [*CALM[:50], *(step(k, norm=1.5 ** (k - 50)) for k in range(51, 61))]
    result = verdict_on(steps, [measured_at(40, 0.9), measured_at(50, 1.4)])
    assert (result.cause, result.layer) == ("layer", "2")


def test_an_edge_left_before_explains_the_gradient() -> None:
    """Catches a large gradient named as the cause where it is the consequence, and the reverse.

    At 1.3 times the limit gradients grow 1.6-fold in a step, so a larger jump needs another cause.
    """
    steps = [*CALM[:54], step(55, norm=40.0), *CALM[55:]]
    assert verdict_on(steps, [measured_at(50, 30.0)]).cause == "layer"
    assert verdict_on(steps, [measured_at(50, 1.3)]).cause == "batch"
    grown = [*CALM[:54], *(step(k, norm=1.6 ** (k - 54)) for k in range(55, 61))]
    assert verdict_on(grown, [measured_at(50, 1.3)]).cause == "layer"


def test_a_smaller_batch_is_named() -> None:
    """Catches a change of the batch size that only the measurements know of."""
    result = verdict_on(
        CALM, [measured_at(40, 0.5, batch_size=64), measured_at(50, 0.6, batch_size=4)]
    )
    assert (result.cause, result.step) == ("batch size", 50)
    assert "The batch size fell from 64 to 4, by step 50." in result.text
    similar = [measured_at(40, 0.5, batch_size=64), measured_at(50, 0.6, batch_size=48)]
    assert verdict_on(CALM, similar).cause == "unknown"


def test_the_edge_without_a_layer_that_holds_it() -> None:
    """Catches a layer blamed for the edge although it holds only the largest of many small shares."""
    result = verdict_on(CALM, [measured_at(40, 0.9), measured_at(60, 1.2, {"0": 0.3, "2": 0.25})])
    assert (result.cause, result.layer) == ("edge", "0")


def test_a_layer_with_large_weights_is_named_and_not_its_neighbours() -> None:
    """Catches a verdict by the top eigenvector: scaling a layer up makes its neighbours sharp."""
    gains = {"0": 0.6, "2": 0.58, "4": 5.8, "6": 0.6}
    result = verdict_on(CALM, [measured_at(10, 8.0, {"2": 0.9, "4": 0.1})], gains)
    assert (result.cause, result.layer) == ("layer", "4")
    assert "The weights of 4 were 9.67 times as large as those of the other layers" in result.text
    assert verdict_on(CALM, [measured_at(10, 0.5, {"2": 0.9})], gains).layer == "4"
    long_ago = verdict_on(CALM[20:], [measured_at(40, 0.5, {"2": 0.9})], gains)
    assert long_ago.cause == "unknown"
    usual = {"0": 0.6, "2": 1.4, "4": 0.7}
    assert verdict_on(CALM, [measured_at(10, 0.5, {"2": 0.9})], usual).cause == "unknown"


def test_values_that_are_not_finite_name_their_layer() -> None:
    """Catches a layer named at random where nothing else is known."""
    bad = StepRecord(60, 0.1, 0.1, {"0": 1.0, "2": float("nan")})
    alarm = Alarm("not finite", 60, "the gradient of 2 is not finite")
    result = verdict(alarm, Evidence([*CALM[:59], bad], []))
    assert (result.cause, result.layer) == ("batch", "2")
    few = verdict(alarm, Evidence([bad], []))  # too few steps to call the batch odd
    assert (few.cause, few.layer) == ("not finite", "2")


@pytest.mark.parametrize("evidence", [Evidence([], []), Evidence(CALM, [measured_at(50, 0.9)])])
def test_where_nothing_is_known_it_is_said(evidence: Evidence) -> None:
    """Catches an invented cause."""
    result = verdict(ROSE, evidence)
    assert (result.cause, result.layer) == ("unknown", None)
    assert "were as before" in result.text


def test_the_group_whose_rate_rose_is_named() -> None:
    """Catches a rise hidden by another group's larger rate, and a group reported without its layers."""
    steps = [
        step(k, lr=1.0, lrs=[1.0, 0.1 if k < 50 else 0.5], moved={"2": 0.3} if k > 50 else {})
        for k in range(1, 61)
    ]
    evidence = Evidence(steps, [], groups=[["0"], ["2", "4"]])
    result = verdict(ROSE, evidence)
    assert (result.cause, result.layer, result.step) == ("learning rate", "2", 50)
    assert "The learning rate of group 1 (2, 4) rose from 0.1 to 0.5 at step 50." in result.text
    unnamed = verdict(ROSE, Evidence(steps, []))
    assert "The learning rate of group 1 rose" in unnamed.text
    assert unnamed.layer is None


def test_a_rise_of_all_groups_names_none() -> None:
    """Catches warm-up of groups with different rates that is blamed on one of them."""
    steps = [step(k, lrs=[1.0, 0.1] if k < 50 else [2.0, 0.2]) for k in range(1, 61)]
    result = verdict(ROSE, Evidence(steps, [], groups=[["0"], ["2"]]))
    assert "The learning rate rose from 1 to 2 at step 50." in result.text
    assert result.layer is None


def test_a_group_that_joins_late_is_no_rise() -> None:
    """Catches rates compared by position although the number of groups has changed."""
    steps = [step(k, lrs=[0.1, 0.2] if k < 50 else [0.1, 0.2, 0.9]) for k in range(1, 61)]
    assert verdict(ROSE, Evidence(steps, [], groups=[["0"], ["2"], []])).cause == "unknown"


def test_the_layer_that_ran_away_first_is_named() -> None:
    """Catches a verdict that names the neighbour, which holds the eigenvector after the weights grew."""
    far = {41: {"2": 0.4, "0": 0.1}, 42: {"0": 9.0, "2": 2.0}}
    leap = {43: 90.0}
    steps = [
        step(k, lrs=[0.1, 3.0], moved=far.get(k, {}), norm=leap.get(k, 1.0)) for k in range(1, 61)
    ]
    measured = [measured_at(60, 30.0, {"0": 0.9, "2": 0.1})]
    result = verdict(ROSE, Evidence(steps, measured, groups=[["0"], ["2"]]))
    assert (result.cause, result.layer, result.step) == ("learning rate", "2", 41)
    assert "group 1 (2) is 3, where 0.1 is usual" in result.text
    assert "by 0.4 times their norm" in result.text
    other = verdict(ROSE, Evidence(steps, measured, groups=[["2"], ["0"]]))
    assert (other.cause, other.layer) == ("layer", "0")  # the layer's rate is the lower one
    same = [replace(each, lrs=()) for each in steps]
    assert verdict(ROSE, Evidence(same, measured, groups=[["0"], ["2"]])).cause == "layer"
    stable = Evidence(same, [measured_at(40, 0.9), measured_at(60, 0.9)])
    assert verdict(ROSE, stable).cause == "batch"


def test_a_layer_that_moved_far_in_its_first_steps_did_not_run_away() -> None:
    """Catches Adam's large first steps, in a group with a larger rate, blamed for a later odd batch."""
    steps = [
        step(k, lrs=[0.1, 3.0], moved={"2": 0.5} if k < 4 else {}, norm=90.0 if k == 40 else 1.0)
        for k in range(1, 61)
    ]
    result = verdict(ROSE, Evidence(steps, [], groups=[["0"], ["2"]]))
    assert (result.cause, result.step) == ("batch", 40)
    still = [replace(each, moved={"2": 0.5} if each.step < 36 else {}) for each in steps]
    result = verdict(ROSE, Evidence(still, [], groups=[["0"], ["2"]]))
    assert (result.cause, result.layer, result.step) == ("learning rate", "2", 1)


def test_weights_that_something_else_changed_are_named() -> None:
    """Catches the next batch blamed for the large gradient that changed weights cause."""
    steps = [
        step(k, changed={"2": 30.0, "0": 1.6} if k == 50 else {}, norm=50.0 if k == 50 else 1.0)
        for k in range(1, 61)
    ]
    result = verdict_on(steps, [])
    assert (result.cause, result.layer, result.step) == ("weights", "2", 50)
    assert "30 times what it was (one of 2 layers that changed)." in result.text
    gone = [step(k, changed={"2": 0.0} if k == 50 else {}) for k in range(1, 61)]
    assert verdict_on(gone, []).cause == "weights"
    small = [step(k, changed={"2": 1.6} if k == 50 else {}) for k in range(1, 61)]
    assert verdict_on(small, []).cause == "unknown"


CLIPPED = [step(k, norm=min(1.0, 0.9 + 0.1 * (k % 3))) for k in range(1, 61)]


def test_clipped_gradients_are_not_called_usual() -> None:
    """Catches "gradients were as before" under clipping, and its absence where they are not clipped."""
    text = verdict_on(CLIPPED, []).text
    assert "Learning rate and batch size were as before" in text
    assert "Gradients are clipped at 1" in text
    assert "grad_norm=norm" in text
    noisy = [step(k, norm=1 + 0.01 * math.sin(k)) for k in range(1, 61)]
    assert "and gradients were as before" in verdict_on(noisy, []).text
    half = [step(k, norm=1 + 4e-3 * (k % 2)) for k in range(1, 61)]  # as bfloat16 rounds
    assert "as before" in verdict(ROSE, Evidence(half, [], precision=2**-7)).text
    assert "clipped" in verdict(ROSE, Evidence(half, [], precision=2**-7)).text


def test_the_norm_before_clipping_shows_the_batch() -> None:
    """Catches a norm before clipping that is ignored, and an ordinary outlier that is blamed."""
    steps = [replace(each, total_norm=1.5 + 0.2 * (each.step % 4)) for each in CLIPPED]
    assert "gradients were as before" in verdict_on(steps, []).text
    steps[54] = replace(steps[54], total_norm=80.0)
    result = verdict_on(steps, [])
    assert (result.cause, result.step) == ("batch", 55)
    assert "was 80, where" in result.text
    skipped = replace(steps[54], total_norm=math.inf, grad_norms={})
    result = verdict_on([*steps[:54], skipped, *steps[55:]], [])
    assert (result.cause, result.layer, result.step) == ("batch", None, 55)
    steps[54] = replace(steps[54], total_norm=3.9)  # not twice what others have
    assert verdict_on(steps, []).cause == "unknown"


def test_the_loss_of_a_batch_shows_it_where_gradients_are_clipped() -> None:
    """Catches a batch hidden by clipping, and an instability or an old outlier reported as a batch."""
    steps = [replace(each, loss=0.4 + 0.1 * (each.step % 3)) for each in CLIPPED]
    odd = [replace(each, loss=9.0, batch=[7, 3]) if each.step == 55 else each for each in steps]
    result = verdict_on(odd, [])
    assert (result.cause, result.step) == ("batch", 55)
    assert (
        "The loss of the batch of the samples 7, 3 at step 55 was 9, where 0.5 was usual"
        in result.text
    )
    assert "Gradients are clipped at 1, so their norm shows no odd batch." in result.text
    stays = [replace(each, loss=9.0) if each.step >= 55 else each for each in steps]
    assert verdict_on(stays, []).cause == "unknown"
    # The edge explains a leap by 49.
    assert verdict_on(odd, [measured_at(40, 0.9), measured_at(50, 4.0)]).cause == "layer"
    late = verdict(replace(ROSE, step=120), Evidence(odd, [], 2.3))
    assert late.cause == "unknown"


WARM = [step(k, lr=1e-3 * k, norm=1.0 + 0.1 * (k % 3)) for k in range(1, 61)]


def test_a_warm_up_is_no_change_of_the_learning_rate() -> None:
    """Catches an ongoing warm-up blamed for a spike that a batch caused."""
    steps = [replace(each, grad_norms={"0": 90.0}) if each.step == 55 else each for each in WARM]
    assert (verdict_on(steps, []).cause, verdict_on(steps, []).step) == ("batch", 55)
    smooth = {
        "cosine": [1.0 - math.cos(math.pi * k / 200) for k in range(1, 61)],
        "exponential": [1.05**k for k in range(60)],
        "staircase": [1.0 + k // 8 for k in range(60)],
        "one cycle": [0.04 + 0.48 * (1 - math.cos(math.pi * k / 60)) for k in range(60)],
    }
    for name, rates in smooth.items():
        result = verdict_on([step(k, lr=lr) for k, lr in enumerate(rates, start=1)], [])
        assert result.cause == "unknown", name
        assert "in warm-up, from" in result.text


def test_a_warm_up_that_reaches_the_limit_is_the_cause() -> None:
    """Catches a warm-up to a too high peak reported as unknown, or blamed on a layer."""
    result = verdict_on(WARM, [measured_at(40, 0.7), measured_at(60, 1.1)])
    assert (result.cause, result.layer, result.step) == ("learning rate", "2", 60)
    assert "was still rising in warm-up, from 0.001 at step 1 to 0.06 at step 60" in result.text
    near = verdict_on(WARM, [measured_at(60, 0.95)])
    assert near.cause == "learning rate"
    assert "The sharpness over its limit was 0.95 at step 60." in near.text
    below = verdict_on(WARM, [measured_at(60, 0.5)])
    assert below.cause == "unknown"
    assert "The learning rate was still rising" in below.text
    assert "Learning rate" not in below.text


def test_a_divergence_in_warm_up_is_no_odd_batch() -> None:
    """Catches a batch blamed for a divergence that took several steps, and faster ones each time.

    The numbers are those of a convolutional network whose warm-up goes on to a rate of 1.15.
    """
    calm = [
        replace(WARM[k - 1], loss=0.6 + 0.3 * (k % 3), grad_norms={"0": 1.0 + 0.3 * (k % 4)})
        for k in range(1, 57)
    ]
    rising = list(zip((1.55, 2.88, 7.25, 187.0), (3.5, 7.5, 31.0, 233.0), strict=True))
    last = [
        replace(WARM[56 + k], loss=loss, grad_norms={"0": norm})
        for k, (loss, norm) in enumerate(rising)
    ]
    above = [measured_at(40, 0.9), measured_at(55, 2.05)]
    assert verdict_on([*calm, *last], above).cause == "learning rate"
    crossed_later = [measured_at(40, 0.9), measured_at(60, 1.6)]
    assert verdict_on([*calm, *last], crossed_later).cause == "learning rate"
    leap = [*calm, replace(last[0], grad_norms={"0": 1.4}, moved={"0": 0.4}), last[3]]
    assert verdict_on([replace(each, loss=0.6) for each in leap], above).cause == "learning rate"
    # Without the rise before it, the same batch is odd, also if it leaves a large sharpness behind.
    sudden = [
        *calm,
        *(replace(c, step=s.step, lr=s.lr) for c, s in zip(calm, last[:3], strict=False)),
        last[3],
    ]
    assert verdict_on(sudden, crossed_later).cause == "batch"
    below_zero = [replace(each, loss=each.loss - 5.0) for each in sudden[:59]] + [last[3]]
    assert verdict_on(below_zero, crossed_later).cause == "batch"


def test_the_last_loss_is_odd_only_where_no_sharpness_explains_it() -> None:
    """Catches a loss that counts as passing before the next one is known."""
    losses = [replace(each, loss=0.4 + 0.1 * (each.step % 3)) for each in CLIPPED]
    last = [*losses[:59], replace(losses[59], loss=9.0)]
    assert verdict_on(last, [measured_at(40, 0.9)]).cause == "batch"
    assert verdict_on(last, [measured_at(40, 0.9), measured_at(60, 3.0)]).cause == "batch"
    assert verdict_on(last, [measured_at(40, 1.2)]).cause != "batch"


def test_a_jump_or_a_kink_in_a_schedule_is_a_change() -> None:
    """Catches a missed change of the rate: a jump in a warm-up, a warm restart, the start of a rise."""
    jump = [step(k, lr=1e-3 * k * (1 if k < 50 else 2)) for k in range(1, 61)]
    restart = [step(k, lr=0.1 * 0.95**k if k < 50 else 0.1) for k in range(1, 61)]
    kink = [step(k, lr=0.1 + 0.01 * max(0, k - 49)) for k in range(1, 61)]
    for steps in (jump, restart, kink):
        result = verdict_on(steps, [])
        assert (result.cause, result.step) == ("learning rate", 50)
    assert "rose from 0.1 to 0.21 from step 50 to 60." in verdict_on(kink, []).text


@pytest.mark.parametrize("cause", ["learning rate", "weights", "batch", "unknown", "edge"])
def test_a_verdict_says_what_to_do(cause: str) -> None:
    """Catches a cause without advice."""
    assert Verdict(cause, "").advice.endswith(".")
