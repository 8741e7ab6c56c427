"""`verdict`: what the evidence says about the cause of an alarm, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, MeasuredRecord, StepRecord, robust_score

__all__ = ["Verdict", "verdict"]

_LR_RISE, _LR_STEPS = 1.2, 50
"""A learning rate counts as raised if it is so many times the median of the steps before, and the rise
is at most so many steps before the alarm."""

_BATCH_SIZE_DROP = 1.5
_GRADIENT_SCORE, _GRADIENT_LEAP = 10.0, 4.0
"""Robust standard deviations, and factor over the step before, of the gradient of an odd batch: a
direction that grows by instability grows over several steps."""

_GAIN_FACTOR = 3.0
"""Factor of a layer's gain over the median of the others from which it counts as scaled up."""

_LEAPS = 3.0
"""How many times the growth that a sharpness above its limit explains a leap of the gradient must be."""

_WEIGHTS_CHANGE = 2.0
"""Factor, or its inverse, of a change of weights between two steps that counts as a cause."""

_FAR = 0.2
"""Movement in one step, relative to the norm of a layer's weights, that no stable training makes after
its first steps."""

_STILL = 10
"""Steps before an odd batch in which a layer that explains it moved far last: its weights may have grown
so that further steps are short relative to them."""

_HALF = 0.5


@dataclass(frozen=True)
class Verdict:
    """The likely cause of an alarm.

    Attributes:
        cause: ``"learning rate"``, ``"weights"``, ``"batch"``, ``"batch size"``, ``"layer"``,
            ``"edge"``, ``"not finite"`` or ``"unknown"``.
        text: sentences.
        layer: the layer that the evidence names, or ``None``.
        step: the step at which it began, or ``None``.
    """

    cause: str
    text: str
    layer: str | None = None
    step: int | None = None


def verdict(alarm: Alarm, evidence: Evidence) -> Verdict:
    """Return the likely cause of ``alarm``.

    A raised learning rate comes first, since it makes every other sign, and weights that something
    other than the optimizer has changed. A smaller batch follows, then the gradient of an odd batch, a
    layer whose weights began far larger than the others', which makes its neighbours sharp, a group
    whose learning rate is above the others' and whose weights ran away first, and then a layer that
    holds a sharpness above its limit.

    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> verdict(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The loss rose. The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    said = alarm.text[0].upper() + alarm.text[1:] + "."
    edge = _edge(evidence)
    beyond = f" {edge.text}" if edge is not None else ""
    jump = _lr_jump(alarm, evidence)
    if jump is not None:
        layer = jump.layer or (edge.layer if edge is not None else None)
        return Verdict("learning rate", f"{said} {jump.text}{beyond}", layer, jump.step)
    changed = _changed_weights(alarm, evidence)
    if changed is not None:
        return Verdict("weights", f"{said} {changed.text}{beyond}", changed.layer, changed.step)
    smaller = _smaller_batch(evidence)
    if smaller is not None:
        return Verdict("batch size", f"{said} {smaller.text}{beyond}", None, smaller.step)
    odd = _odd_batch(evidence)
    runaway = _runaway_group(evidence, alarm.step if odd is None else odd.step or alarm.step, odd)
    if odd is not None and (runaway is None or (runaway.step or 0) >= (odd.step or 0)):
        return Verdict("batch", f"{said} {odd.text}", odd.layer, odd.step)
    scaled = _scaled_layer(evidence)
    early = not evidence.steps or evidence.steps[0].step == 1
    if scaled is not None and (early or edge is not None):
        gain, usual = evidence.first_gains[scaled], _others(evidence, scaled)
        began = (
            f" The weights of {scaled} were {gain / usual:.3g} times as large as those of the other"
            " layers when recording began, for its number of inputs."
        )
        return Verdict("layer", f"{said}{began}{beyond}", scaled, alarm.step)
    if runaway is not None:
        text = f"{said} {runaway.text}{beyond}"
        return Verdict("learning rate", text, runaway.layer, runaway.step)
    if edge is not None:
        return Verdict(edge.cause, f"{said}{beyond}", edge.layer, edge.step)
    if alarm.kind == "not finite":
        return Verdict("not finite", said, _not_finite_layer(evidence), alarm.step)
    return Verdict(
        "unknown",
        f"{said} Learning rate, batch size and gradients were as before, and no sharpness above its"
        " limit was measured.",
    )


def _lr_jump(alarm: Alarm, evidence: Evidence) -> Verdict | None:
    """Return the largest recent rise of a learning rate, and its group if others did not rise so."""
    groups = max(1, *(len(its.lrs) for its in evidence.steps)) if evidence.steps else 1
    jumps = [_jump(alarm, _rates(evidence, group)) for group in range(groups)]
    known = {group: jump for group, jump in enumerate(jumps) if jump is not None}
    if not known:
        return None
    group = max(known, key=lambda each: known[each][0])
    factor, before, after, step = known[group]
    alone = min(jump[0] if jump else 1.0 for jump in jumps) < factor / _LR_RISE
    which = f" of {_group(evidence, group)}" if alone else ""
    text = f"The learning rate{which} rose from {before:.3g} to {after:.3g} at step {step:,}."
    layer = _most_moved(evidence, _layers_in(evidence, group), step) if alone else None
    return Verdict("learning rate", text, layer, step)


def _rates(evidence: Evidence, group: int) -> list[tuple[int, float]]:
    """Return the learning rate of a group at each step, that of all where they agree."""
    found = [
        (its.step, its.lrs[group] if its.lrs else its.lr)
        for its in evidence.steps
        if not its.lrs or group < len(its.lrs)
    ]
    return [(step, lr) for step, lr in found if lr > 0]


def _jump(
    alarm: Alarm, rates: Sequence[tuple[int, float]]
) -> tuple[float, float, float, int] | None:
    """Return the largest recent rise: factor, rate before and after, and step."""
    found: tuple[float, float, float, int] | None = None
    for at in range(1, len(rates)):
        step, lr = rates[at]
        before = median(rate for _, rate in rates[max(0, at - 20) : at])
        factor, recent = lr / before, alarm.step - step <= _LR_STEPS
        if recent and factor >= _LR_RISE and (found is None or factor > 1.01 * found[0]):
            found = factor, before, lr, step
    return found


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
            most[layer] = max(most[layer], _finite_or_inf(its.moved.get(layer, 0.0)))
    return max(most, key=lambda layer: most[layer], default=None)


def _changed_weights(alarm: Alarm, evidence: Evidence) -> Verdict | None:
    """Return the layer whose weights something other than the optimizer has changed most."""
    found: Verdict | None = None
    most = _WEIGHTS_CHANGE
    for its in evidence.steps:
        for layer, factor in its.changed.items() if alarm.step - its.step <= _LR_STEPS else ():
            size = max(factor, 1 / factor) if factor > 0 else math.inf
            if size >= most:
                several = len(its.changed)
                more = f" (one of {several} layers that changed)" if several > 1 else ""
                text = (
                    f"Before step {its.step:,} something other than the optimizer changed the weights"
                    f" of {layer}: their norm is {factor:.3g} times what it was{more}."
                )
                most, found = size, Verdict("weights", text, layer, its.step)
    return found


def _runaway_group(evidence: Evidence, trouble: int, odd: Verdict | None) -> Verdict | None:
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
    known = {layer: _finite_or_inf(by) for layer, by in step.moved.items()}
    return {layer: by for layer, by in known.items() if by >= _FAR}


def _smaller_batch(evidence: Evidence) -> Verdict | None:
    sizes = [
        (its.step, its.margins.batch_size) for its in evidence.measured if its.margins.batch_size
    ]
    for (_, before), (step, after) in pairwise(sizes[-6:]):
        if before is not None and after is not None and before >= _BATCH_SIZE_DROP * after:
            text = f"The batch size fell from {before} to {after}, by step {step:,}."
            return Verdict("batch size", text, step=step)
    return None


def _odd_batch(evidence: Evidence) -> Verdict | None:
    steps: list[StepRecord] = [its for its in evidence.steps if its.grad_norms]
    for at in range(10, len(steps)):
        its, norm = steps[at], steps[at].grad_norm
        before = [one.grad_norm for one in steps[max(0, at - 50) : at]]
        if not all(map(math.isfinite, before)):
            return None
        leap = norm / max(before[-1], 1e-300)
        usual = max(_GRADIENT_LEAP, _LEAPS * _growth(evidence, its.step))
        odd = not math.isfinite(norm) or (
            robust_score(norm, before) > _GRADIENT_SCORE and leap > usual
        )
        if odd:
            layer = max(its.grad_norms, key=lambda name: _finite_or_inf(its.grad_norms[name]))
            which = "" if its.batch is None else f" of the samples {_listed(its.batch)}"
            text = (
                f"The gradient of the batch{which} at step {its.step:,} was {norm:.3g}, where"
                f" {median(before):.3g} was usual; it is largest in {layer}."
            )
            return Verdict("batch", text, layer, its.step)
    return None


def _edge(evidence: Evidence) -> Verdict | None:
    """Return the layer that holds a sharpness above its limit."""
    over: MeasuredRecord | None = None
    for its in reversed(evidence.measured):
        if its.ratio is None:
            continue
        if its.ratio <= 1:
            break
        over = its
    if over is None:
        return None
    assert over.ratio is not None
    margins = over.margins
    name = "sharpness" if margins.preconditioned_sharpness is None else "preconditioned sharpness"
    first = "was" if over is evidence.measured[0] else "crossed its limit and was"
    text = f"The {name} {first} {over.ratio:.3g} times its limit at step {over.step:,}"
    layer, share = next(iter(over.shares.items()), (None, 0.0))
    text += f", {share:.0%} of it in {layer}." if layer else "."
    cause = "layer" if share >= _HALF else "edge"
    return Verdict(cause, text, layer, over.step)


def _growth(evidence: Evidence, step: int) -> float:
    r"""Return the largest factor by which instability makes gradients grow in a step before ``step``.

    Along an eigenvector gradient descent multiplies the gradient by :math:`1-\eta\lambda`, whose size
    at r times the limit is :math:`2r-1`.
    """
    ratios = [its.ratio for its in evidence.measured if its.step < step and its.ratio is not None]
    return max([1.0, *(2 * ratio - 1 for ratio in ratios)])


def _scaled_layer(evidence: Evidence) -> str | None:
    gains = evidence.first_gains
    if len(gains) < 2:
        return None
    top = max(gains, key=lambda name: gains[name])
    return top if gains[top] > _GAIN_FACTOR * _others(evidence, top) else None


def _others(evidence: Evidence, name: str) -> float:
    gains = evidence.first_gains
    return max(median(gain for other, gain in gains.items() if other != name), 1e-300)


def _not_finite_layer(evidence: Evidence) -> str | None:
    for its in evidence.steps:
        for layer, norm in its.grad_norms.items():
            if not math.isfinite(norm):
                return layer
    return None


def _finite_or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _listed(batch: object) -> str:
    shown = [str(one) for one in batch] if isinstance(batch, (list, tuple)) else [str(batch)]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")
