"""Learning rates as the cause of an alarm: a sudden rise, a group's high rate, a fast warm-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord, finite_or_inf
from stableopt.recorder.finding import Verdict

__all__ = [
    "changed_rate",
    "high_from_the_start",
    "moved_far_in",
    "runaway_group",
    "too_fast",
    "warming_up",
]

_LR_RISE, _LR_STEPS = 1.2, 50
"""Factor over the rate that the schedule would have, and steps before the alarm, of a recent rise."""

_KINK = 1.5
"""Factor between an increment of the learning rate and the largest one before, above which the increment
does not belong to the schedule."""

_SETTLED = 5
"""Increments needed to judge a schedule that rises from the first step: at first even those of a smooth
schedule grow manifold."""

_RAMP = 20
"""Steps over which a change of the learning rate may extend."""

_NEAR_EDGE = 0.9
"""Sharpness over its limit, or realised edge, from which a warm-up counts as too fast."""

_LATEST = 3
"""Latest measurements that count at any age."""

_MAX_STABLE_MOVE = 0.2
"""Relative movement of a layer in one step that stable training makes only in its first steps."""

_GREW, _FELL = 2.0, 2.0
"""Factor of most losses over the first one with which training has never worked, and factor by which the
learning rate has then not fallen."""

_STILL = 10
"""Steps before an odd batch within which a runaway layer last moved far: its weights may have grown so
much that later steps are relatively short."""


def changed_rate(alarm: Alarm, evidence: Evidence) -> Verdict | None:
    """Return the largest recent rise of a learning rate, and its group if other groups rose less.

    A jump counts, and so does the start of a ramp. A rise that continues a schedule, such as a
    warm-up, does not.

    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> changed_rate(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    groups = max((len(record.lrs) for record in evidence.steps), default=1) or 1
    rises = [_largest_rise(alarm, _rates(evidence, group)) for group in range(groups)]
    factors = [1.0 if rise is None else rise.factor for rise in rises]
    group = factors.index(max(factors))
    rise = rises[group]
    if rise is None:
        return None
    alone = min(factors) < rise.factor / _LR_RISE
    owner = f" of {_named(evidence, group)}" if alone else ""
    when = f"at step {rise.step:,}"
    if rise.end != rise.step:
        when = f"from step {rise.step:,} to {rise.end:,}"
    text = f"The learning rate{owner} rose from {rise.before:.3g} to {rise.after:.3g} {when}."
    layer = _most_moved(evidence, _layers_in(evidence, group), rise.step) if alone else None
    return Verdict("learning rate", text, layer, rise.step)


class _Rise(NamedTuple):
    """A rise of a learning rate, and its factor over the rate that the schedule would have."""

    factor: float
    before: float
    after: float
    step: int
    end: int


def _largest_rise(alarm: Alarm, rates: Sequence[tuple[int, float]]) -> _Rise | None:
    """Return the largest recent rise in ``rates``, pairs of step and rate, beyond its schedule."""
    largest: _Rise | None = None
    for start in range(2, len(rates)):
        step, lr = rates[start]
        earlier = [rate for _, rate in rates[max(0, start - _LR_STEPS) : start]]
        increments = [max(b - a, 0.0) for a, b in pairwise(earlier)]
        usual = max(increments, default=0.0)
        unsettled = usual > 0 and len(increments) < _SETTLED
        if unsettled or not 0 <= alarm.step - step <= _LR_STEPS:
            continue
        before = max(earlier[-1], median(earlier[-_RAMP:]))
        if lr - before <= _KINK * usual:
            continue
        is_jump = lr >= _LR_RISE * (before + usual)
        ramp = rates[start : start + (1 if is_jump else _RAMP)]
        for increment, (end, after) in enumerate(ramp, start=1):
            factor = after / (before + increment * usual)
            larger = largest is None or factor > 1.01 * largest.factor
            if end <= alarm.step and factor >= _LR_RISE and larger:
                largest = _Rise(factor, before, after, step, end)
    return largest


def warming_up(alarm: Alarm, evidence: Evidence) -> str | None:
    """Return a clause about a learning rate that still rises along its schedule, or rose until recently.

    >>> steps = [StepRecord(k, 0.001 * k) for k in range(1, 51)]
    >>> warming_up(Alarm("loss", 50, "the loss rose"), Evidence(steps, []))
    'was still rising in warm-up, from 0.001 at step 1 to 0.05 at step 50'
    """
    rates = [(s.step, s.lr) for s in evidence.steps if s.lr > 0 and s.step <= alarm.step]
    if not rates:
        return None
    start, first = rates[0]
    end, top = max(rates, key=lambda pair: pair[1])
    if top < _LR_RISE * first or alarm.step - end > _LR_STEPS:
        return None
    phase = "was still rising in warm-up" if end >= rates[-1][0] else "had just risen in warm-up"
    return f"{phase}, from {first:.3g} at step {start:,} to {top:.3g} at step {end:,}"


def high_from_the_start(alarm: Alarm, evidence: Evidence) -> str | None:
    """Return a sentence about a learning rate with which training has never worked, or ``None``.

    It has not if the evidence begins with the first step, most of the losses after it are more than
    twice its loss, and the rate has not fallen by half since.

    >>> steps = [StepRecord(k, 20.0, loss=1.0 * k) for k in range(1, 31)]
    >>> high_from_the_start(Alarm("loss", 30, "the loss rose"), Evidence(steps, []))
    'The learning rate was 20 at step 1, and most losses since then are more than twice the first one.'
    """
    steps = [step for step in evidence.steps if step.step <= alarm.step]
    if not steps or steps[0].step != 1 or steps[0].loss is None or evidence.starts_at_zero:
        return None
    first, *later = [finite_or_inf(step.loss) for step in steps if step.loss is not None]
    fell = steps[-1].lr < steps[0].lr / _FELL
    if fell or len(later) < _LATEST or not median(later) > _GREW * abs(first):
        return None
    return (
        f"The learning rate was {steps[0].lr:.3g} at step 1, and most losses since then are more than"
        " twice the first one."
    )


def too_fast(alarm: Alarm, evidence: Evidence) -> str | None:
    """Return a sentence about the largest recent margin, if it is near its limit or beyond."""
    candidates: list[tuple[float, int, str]] = []
    for record in evidence.measured:
        if record not in evidence.measured[-_LATEST:] and alarm.step - record.step > _LR_STEPS:
            continue
        edge = record.margins.results.get("realised_edge")
        realised = None if edge is None else edge.value
        for value, name in (
            (record.ratio, "sharpness over its limit"),
            (realised, "realised edge"),
        ):
            if value is not None and math.isfinite(value):
                candidates.append((value, record.step, name))
    if not candidates:
        return None
    value, step, name = max(candidates, key=lambda candidate: candidate[0])
    return f"The {name} was {value:.3g} at step {step:,}." if value >= _NEAR_EDGE else None


def runaway_group(evidence: Evidence, trouble: int, odd: Verdict | None) -> Verdict | None:
    """Return the group whose weights moved far first, if its learning rate is above the others'.

    The instability begins in the first layer that moves far in one step. A few steps later the
    gradients of all other layers contain its weights, so curvature and gradients are largest elsewhere.
    A layer that moved far only long before the step ``trouble``, as in the first steps of Adam, does
    not explain an odd batch.
    """
    within = _LR_STEPS if odd is None else _STILL
    steps = [s for s in evidence.steps if 0 <= trouble - s.step <= _LR_STEPS and s.lrs]
    last_far: dict[str, int] = {}
    for record in steps:
        last_far |= dict.fromkeys(moved_far_in(record), record.step)
    for record in steps:
        far = {
            layer: length
            for layer, length in moved_far_in(record).items()
            if trouble - last_far[layer] <= within
        }
        if far:
            layer = max(far, key=lambda name: far[name])
            return _runaway(evidence, record, layer, far[layer])
    return None


def _runaway(evidence: Evidence, record: StepRecord, layer: str, length: float) -> Verdict | None:
    """Return the verdict on the group of ``layer``, the one with the highest rate of several.

    ``None`` if its rate is not above those of the others.
    """
    lrs = record.lrs
    groups = [group for group in range(len(lrs)) if layer in _layers_in(evidence, group)]
    if not groups:
        return None
    group = max(groups, key=lambda index: lrs[index])
    usual = median(lr for other, lr in enumerate(lrs) if other != group)
    if lrs[group] < _LR_RISE * usual:
        return None
    text = (
        f"The learning rate of {_named(evidence, group)} is {lrs[group]:.3g}, where"
        f" {usual:.3g} is usual, and at step {record.step:,} the weights of {layer} were the first to"
        f" move far, by {length:.3g} times their norm."
    )
    return Verdict("learning rate", text, layer, record.step)


def moved_far_in(step: StepRecord) -> dict[str, float]:
    """Return the layers that a step moved far, with the relative length of the step."""
    lengths = {layer: finite_or_inf(length) for layer, length in step.moved.items()}
    return {layer: length for layer, length in lengths.items() if length >= _MAX_STABLE_MOVE}


def _rates(evidence: Evidence, group: int) -> list[tuple[int, float]]:
    """Return the positive learning rates of a group, each with its step."""
    rates = [
        (record.step, record.lrs[group] if record.lrs else record.lr)
        for record in evidence.steps
        if not record.lrs or group < len(record.lrs)
    ]
    return [(step, lr) for step, lr in rates if lr > 0]


def _layers_in(evidence: Evidence, group: int) -> Sequence[str]:
    return evidence.groups[group] if group < len(evidence.groups) else ()


def _named(evidence: Evidence, group: int) -> str:
    """Return the number of a group with its first layers, for a sentence."""
    layers = _layers_in(evidence, group)
    shown = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    return f"group {group} ({shown})" if shown else f"group {group}"


def _most_moved(evidence: Evidence, layers: Sequence[str], step: int) -> str | None:
    """Return which of ``layers`` moved most in one step, relative to its weights, from ``step`` on."""
    most: dict[str, float] = dict.fromkeys(layers, 0.0)
    for record in evidence.steps:
        if record.step >= step:
            for layer in layers:
                most[layer] = max(most[layer], finite_or_inf(record.moved.get(layer, 0.0)))
    return max(most, key=lambda layer: most[layer], default=None)
