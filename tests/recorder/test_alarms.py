"""Alarm rules: which evidence calls for a report, and which does not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest

from stableopt import StabilityMargins
from stableopt.recorder import AlarmRules, Evidence, StepRecord
from stableopt.recorder.evidence import MeasuredRecord, first_level, robust_score
from stableopt.stability import Measurement, QuantityResult


def steps(losses: Sequence[float | None]) -> list[StepRecord]:
    return [StepRecord(k, 0.1, loss) for k, loss in enumerate(losses, start=1)]


def measured(ratios: Sequence[float | None], losses: Sequence[float]) -> list[MeasuredRecord]:
    return [
        MeasuredRecord(
            StabilityMargins(step=10 * k, loss=loss, sharpness=ratio, sharpness_limit=1.0)
        )
        for k, (ratio, loss) in enumerate(zip(ratios, losses, strict=True), start=1)
    ]


def kind(evidence: Evidence, rules: AlarmRules | None = None) -> str | None:
    alarm = (rules or AlarmRules()).alarm(evidence)
    return None if alarm is None else alarm.kind


def noisy(count: int, level: Callable[[int], float]) -> list[float]:
    random.seed(0)
    return [level(k) * math.exp(random.gauss(0, 0.3)) for k in range(count)]


def test_a_robust_score_is_in_standard_deviations() -> None:
    """Catches a spread that a single outlier changes."""
    random.seed(0)
    normal = [random.gauss(5.0, 2.0) for _ in range(4000)]
    # The error of the median absolute deviation of 4,000 values is about 2 %.
    assert robust_score(11.0, normal) == pytest.approx(3.0, rel=0.06)
    assert robust_score(11.0, [*normal, 1e9]) == pytest.approx(3.0, rel=0.06)
    assert robust_score(2.0, [1.0] * 5) == pytest.approx(100.0)


def test_losses_that_fall_with_noise_give_no_alarm() -> None:
    """Catches an alarm in a healthy run, at any of its steps."""
    losses = noisy(600, lambda k: 2.3 * math.exp(-k / 80) + 0.01)
    for end in range(5, 600, 5):
        first = max(0, end - 200)
        assert kind(Evidence(steps(losses[first:end]), [], losses[0])) is None, end


def test_an_odd_sample_near_a_minimum_is_no_spike() -> None:
    """Catches an alarm for a batch whose one hard sample costs a twentieth of the first loss."""
    losses = noisy(200, lambda k: 1e-3)
    losses[-3] = 0.12
    assert kind(Evidence(steps(losses), [], 2.3)) is None


def test_a_spike_is_one_where_the_loss_leaps_by_its_noise_and_by_much() -> None:
    """Catches a spike that is missed, and an alarm before the spike."""
    losses = noisy(205, lambda k: 0.1 if k < 200 else 1.0)
    assert kind(Evidence(steps(losses[:200]), [], 2.3)) is None
    assert kind(Evidence(steps(losses), [], 2.3)) == "loss"
    assert kind(Evidence(steps(losses), [], 2.3), AlarmRules(loss_rise=0.9)) is None
    assert kind(Evidence(steps(losses), [], 2.3), AlarmRules(loss_factor=50.0)) is None


def test_a_loss_above_the_first_one_is_a_spike_at_once() -> None:
    """Catches fine-tuning that diverges in its first steps, before there is any statistics."""
    assert kind(Evidence(steps([2.3, 3.0, 9.0, 20.0, 30.0]), [], 2.3)) == "loss"
    assert kind(Evidence(steps([2.3, 3.0, 3.0, 3.0, 3.0]), [], 2.3)) is None
    assert kind(Evidence(steps([2.3, 3.0, 9.0, 20.0, 30.0]), [], None)) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_alarm(bad: float) -> None:
    """Catches a NaN that gives no alarm: comparisons with NaN are always false."""
    assert kind(Evidence(steps([1.0, bad]), [])) == "not finite"
    gradient = StepRecord(3, 0.1, 1.0, {"0": 1.0, "2": bad})
    assert kind(Evidence([gradient], [])) == "not finite"
    margins = StabilityMargins(step=5, failure="not finite: the loss is nan")
    assert kind(Evidence([], [MeasuredRecord(margins)])) == "not finite"
    other = StabilityMargins(step=5, failure="ValueError: something else")
    assert kind(Evidence([], [MeasuredRecord(other)])) is None


def test_a_ratio_is_an_alarm_where_the_loss_does_not_fall() -> None:
    """Catches alarms at the edge of stability, and in a catapult that ends well."""
    assert kind(Evidence([], measured([0.9, 1.4], [1.0, 1.1]))) is None
    assert kind(Evidence([], measured([0.9, 1.6], [1.0, 0.9]))) is None
    assert kind(Evidence([], measured([0.9, 1.6], [1.0, 1.1]))) == "ratio"
    assert kind(Evidence([], measured([1.6], [1.0]), first_loss=0.9)) == "ratio"
    assert kind(Evidence([], measured([1.6], [1.0]), first_loss=1.1)) is None
    assert kind(Evidence([], measured([None], [1.0]))) is None


def test_the_probe_loss_spikes_without_losses_of_batches() -> None:
    """Catches a recorder that is blind where the loop reports no losses."""
    calm = [1.0, 0.8, 0.7, 0.6, 0.5, 0.45]
    assert kind(Evidence([], measured([0.9] * 6, calm), 1.0)) is None
    assert kind(Evidence([], measured([0.9] * 7, [*calm, 5.0]), 1.0)) == "loss"


def test_the_realised_edge_alarms_after_several_measurements_beyond_two_errors() -> None:
    """Catches an alarm for a single uphill step, which is usual with mini-batches."""

    def records(values: Sequence[tuple[float | None, float]]) -> list[MeasuredRecord]:
        return [
            MeasuredRecord(
                StabilityMargins(
                    results={
                        "realised_edge": QuantityResult(
                            value=value,
                            measurement=None if value is None else Measurement(value, error, 1),
                        )
                    }
                )
            )
            for value, error in values
        ]

    assert kind(Evidence([], records([(1.5, 0.1)] * 3))) == "realised edge"
    assert kind(Evidence([], records([(1.5, 0.1)] * 2))) is None
    assert kind(Evidence([], records([(1.5, 0.1), (0.9, 0.1), (1.5, 0.1)]))) is None
    assert kind(Evidence([], records([(1.5, 0.3)] * 3))) is None  # 1.5 - 2 x 0.45
    assert kind(Evidence([], records([(None, 0.0)] * 3))) is None


@pytest.mark.parametrize("name", ["loss_score", "loss_rise", "loss_factor", "ratio", "patience"])
def test_rules_have_positive_numbers(name: str) -> None:
    """Catches thresholds that would give an alarm at every step."""
    with pytest.raises(ValueError, match=f"{name}=0"):
        AlarmRules(**{name: 0})  # type: ignore[arg-type]


def test_a_spike_while_the_loss_still_falls() -> None:
    """Catches a spike missed because the descent before it widens the spread."""
    falling = [1.2 * 0.97**k for k in range(60)]
    noise = [1 + 0.05 * (k * 7 % 5 - 2) for k in range(65)]
    losses = [loss * off for loss, off in zip([*falling, *[1.2] * 5], noise, strict=True)]
    steps = [StepRecord(k + 1, 0.1, loss=loss) for k, loss in enumerate(losses)]
    rules = AlarmRules()
    assert rules.alarm(Evidence(steps[:60], [], 2.3)) is None
    assert rules.alarm(Evidence(steps, [], 2.3)) is not None


def alarms(losses: Sequence[float], moved: float = 0.0) -> list[int]:
    """Return the steps with an alarm because the loss is above that at the start."""
    records = [StepRecord(k, 0.1, loss, moved={"0": moved}) for k, loss in enumerate(losses, 1)]
    steps = []
    for end in range(5, len(losses) + 1, 5):
        first = losses[: min(end, 20)]
        evidence = Evidence(records[:end][-200:], [], first_level(first), first_losses=first)
        alarm = AlarmRules().alarm(evidence)
        if alarm is not None and "at the start" in alarm.text:
            steps.append(end)
    return steps


def test_losses_of_single_samples_give_no_alarm() -> None:
    """Catches an alarm where the loss is twice that of one lucky batch.

    The 48 healthy runs have batches of one or two samples, with squared normal errors whose level
    falls to a third.
    """
    for samples in (1, 2):
        generator = random.Random(samples)
        for _ in range(24):
            levels = [0.3 + 0.7 * math.exp(-k / 100) for k in range(400)]
            means = [
                level * sum(generator.gauss(0, 1) ** 2 for _ in range(2 * samples)) / 2 / samples
                for level in levels
            ]
            assert alarms(means) == []


def test_a_loss_that_starts_at_zero_may_grow() -> None:
    """Catches alarms of a policy's loss, which starts at zero and is beta KL once the policy learns."""
    growing = [1e-9, *(1e-6 * k**2 for k in range(1, 300))]
    assert alarms(growing) == []
    # Between them the loss leaps: no sign either, and not a number stays one.
    leaping = [1e-9, *([1e-4] * 60), *([0.1] * 10)]
    evidence = Evidence(steps(leaping), [], first_level(leaping[:20]), first_losses=leaping[:20])
    assert AlarmRules().alarm(evidence) is None
    broken = [*leaping, math.nan]
    evidence = Evidence(steps(broken), [], first_level(leaping[:20]), first_losses=leaping[:20])
    assert kind(evidence) == "not finite"


def test_an_explosion_in_the_first_steps_does_not_start_at_zero() -> None:
    """Catches a first loss that is small only next to those of an explosion."""
    assert not Evidence([], [], first_losses=[0.01, 3.0, 1e5, 1e12]).starts_at_zero


def test_a_loss_that_explodes_is_found_in_the_first_steps_if_weights_do() -> None:
    """Catches a first level that the explosion raises, and alarms for losses that vary by chance."""
    losses = [11.0, 370.0, 120.0, 50.0, 35.0]
    assert alarms(losses, moved=0.6) == [5]
    assert alarms(losses) == []
    # Later the first losses say what is usual: here from 9 to 11.
    usual = [10.0 + (-1) ** k for k in range(20)]
    assert alarms([*usual, *[25.0] * 5]) == [25]
    assert alarms([*usual, *[19.0] * 5]) == []
