"""Learning rates as a cause: one that changed, a group's that is too high, one that still warms up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord, finite_or_inf
from stableopt.recorder.finding import Verdict

__all__ = ["changed_rate", "runaway_group", "too_fast", "warming_up"]

_LR_RISE, _LR_STEPS = 1.2, 50
"""A learning rate counts as raised if it is so many times what its course before explains, and the
rise is at most so many steps before the alarm."""

_KINK = 1.5
"""Factor between the increment of a learning rate and the largest before from which it is a change, and
not a schedule that goes on."""

_SETTLED = 5
"""Increments after which a schedule that rises from the first step on is judged: those of a smooth one
grow manifold before."""

_RAMP = 20
"""Steps in which a change of the learning rate may raise it."""

_NEAR = 0.9
"""Sharpness over its limit, or realised edge, from which a warm-up counts as too fast."""

_LATEST = 3
"""Measurements that count also where they are older."""

_FAR = 0.2
"""Movement in one step, relative to the norm of a layer's weights, that no stable training makes after
its first steps."""

_STILL = 10
"""Steps before an odd batch in which a layer that explains it moved far last: its weights may have grown
so that further steps are short relative to them."""


def changed_rate(alarm: Alarm, evidence: Evidence) -> Verdict | None:
    """Return the largest recent rise of a learning rate, and its group if others did not rise so.

    A rise that continues a schedule, such as a warm-up, does not count. A jump does, and the beginning
    of a rise.

    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> changed_rate(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    groups = max(1, *(len(its.lrs) for its in evidence.steps)) if evidence.steps else 1
    rises = [_change(alarm, _rates(evidence, group)) for group in range(groups)]
    known = {group: rise for group, rise in enumerate(rises) if rise is not None}
    if not known:
        return None
    group = max(known, key=lambda each: known[each][0])
    factor, before, after, step, end = known[group]
    alone = min(rise[0] if rise else 1.0 for rise in rises) < factor / _LR_RISE
    which = f" of {_group(evidence, group)}" if alone else ""
    when = f"at step {step:,}" if end == step else f"from step {step:,} to {end:,}"
    text = f"The learning rate{which} rose from {before:.3g} to {after:.3g} {when}."
    layer = _most_moved(evidence, _layers_in(evidence, group), step) if alone else None
    return Verdict("learning rate", text, layer, step)


def _change(
    alarm: Alarm, rates: Sequence[tuple[int, float]]
) -> tuple[float, float, float, int, int] | None:
    """Return the largest recent change: factor, rate before and after, first and last step."""
    found: tuple[float, float, float, int, int] | None = None
    for at in range(2, len(rates)):
        step = rates[at][0]
        earlier = [lr for _, lr in rates[max(0, at - _LR_STEPS) : at]]
        rises = [max(b - a, 0.0) for a, b in pairwise(earlier)]
        usual = max(rises, default=0.0)
        unsettled = usual > 0 and len(rises) < _SETTLED
        if unsettled or not 0 <= alarm.step - step <= _LR_STEPS:
            continue
        before = max(earlier[-1], median(earlier[-_RAMP:]))
        if rates[at][1] - before <= _KINK * usual:
            continue
        at_once = rates[at][1] >= _LR_RISE * (before + usual)
        for late, (end, lr) in enumerate(rates[at : at + (1 if at_once else _RAMP)], start=1):
            factor = lr / (before + late * usual)
            more = found is None or factor > 1.01 * found[0]
            if end <= alarm.step and factor >= _LR_RISE and more:
                found = factor, before, lr, step, end
    return found


def warming_up(alarm: Alarm, evidence: Evidence) -> str | None:
    """Return a clause about a learning rate that still rises along its schedule, or just did.

    >>> steps = [StepRecord(k, 0.001 * k) for k in range(1, 51)]
    >>> warming_up(Alarm("loss", 50, "the loss rose"), Evidence(steps, []))
    'was still rising in warm-up, from 0.001 at step 1 to 0.05 at step 50'
    """
    rates = [(its.step, its.lr) for its in evidence.steps if its.lr > 0 and its.step <= alarm.step]
    if not rates:
        return None
    (start, first), (end, top) = rates[0], max(rates, key=lambda each: each[1])
    if top < _LR_RISE * first or alarm.step - end > _LR_STEPS:
        return None
    still = "was still rising in warm-up" if end >= rates[-1][0] else "had just risen in warm-up"
    return f"{still}, from {first:.3g} at step {start:,} to {top:.3g} at step {end:,}"


def too_fast(alarm: Alarm, evidence: Evidence) -> str | None:
    """Return a sentence about a margin near its limit, or beyond, not long before ``alarm``."""
    found: tuple[float, int, str] | None = None
    for its in evidence.measured:
        if its not in evidence.measured[-_LATEST:] and alarm.step - its.step > _LR_STEPS:
            continue
        edge = its.margins.results.get("realised_edge")
        realised = None if edge is None else edge.value
        for value, name in ((its.ratio, "sharpness over its limit"), (realised, "realised edge")):
            if value is not None and math.isfinite(value) and (found is None or value > found[0]):
                found = value, its.step, name
    if found is None or found[0] < _NEAR:
        return None
    return f"The {found[2]} was {found[0]:.3g} at step {found[1]:,}."


def runaway_group(evidence: Evidence, trouble: int, odd: Verdict | None) -> Verdict | None:
    """Return the group whose weights ran away first, if its learning rate is above the others'.

    The first layer to move far in one step is where it began. A few steps later the gradients of all
    others contain its weights, so that curvature and gradients are largest elsewhere. A layer that has
    stopped long before the step ``trouble``, as after the first steps of Adam, does not explain an odd
    batch.
    """
    still = _LR_STEPS if odd is None else _STILL
    steps = [its for its in evidence.steps if 0 <= trouble - its.step <= _LR_STEPS and its.lrs]
    last: dict[str, int] = {}
    for its in steps:
        last |= dict.fromkeys(_far(its), its.step)
    for its in steps:
        far = {layer: by for layer, by in _far(its).items() if trouble - last[layer] <= still}
        if not far:
            continue
        layer = max(far, key=lambda each: far[each])
        group = max(
            (g for g in range(len(its.lrs)) if layer in _layers_in(evidence, g)),
            key=lambda each: its.lrs[each],
            default=None,
        )
        if group is None:
            return None
        usual = median(lr for other, lr in enumerate(its.lrs) if other != group)
        if its.lrs[group] < _LR_RISE * usual:
            return None
        text = (
            f"The learning rate of {_group(evidence, group)} is {its.lrs[group]:.3g}, where"
            f" {usual:.3g} is usual, and at step {its.step:,} the weights of {layer} were the first to"
            f" move far, by {far[layer]:.3g} times their norm."
        )
        return Verdict("learning rate", text, layer, its.step)
    return None


def _far(step: StepRecord) -> dict[str, float]:
    known = {layer: finite_or_inf(by) for layer, by in step.moved.items()}
    return {layer: by for layer, by in known.items() if by >= _FAR}


def _rates(evidence: Evidence, group: int) -> list[tuple[int, float]]:
    """Return the learning rate of a group at each step, that of all where they agree."""
    found = [
        (its.step, its.lrs[group] if its.lrs else its.lr)
        for its in evidence.steps
        if not its.lrs or group < len(its.lrs)
    ]
    return [(step, lr) for step, lr in found if lr > 0]


def _layers_in(evidence: Evidence, group: int) -> Sequence[str]:
    return evidence.groups[group] if group < len(evidence.groups) else ()


def _group(evidence: Evidence, group: int) -> str:
    layers = _layers_in(evidence, group)
    shown = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    return f"group {group} ({shown})" if shown else f"group {group}"


def _most_moved(evidence: Evidence, layers: Sequence[str], step: int) -> str | None:
    """Return the layer of a group that moved most, relative to its weights, from ``step`` on."""
    most: dict[str, float] = dict.fromkeys(layers, 0.0)
    for its in evidence.steps:
        for layer in most if its.step >= step else ():
            most[layer] = max(most[layer], finite_or_inf(its.moved.get(layer, 0.0)))
    return max(most, key=lambda layer: most[layer], default=None)
