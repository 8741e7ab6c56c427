"""`verdict`: what the evidence says about the cause of an alarm, in words."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, MeasuredRecord
from stableopt.recorder.finding import Verdict
from stableopt.recorder.learning_rate import changed_rate, runaway_group, too_fast, warming_up
from stableopt.recorder.odd_batch import clipped_at, odd_batch

__all__ = ["Verdict", "verdict"]

_WITHIN = 50
"""Steps before the alarm in which a cause is looked for."""

_BATCH_SIZE_DROP = 1.5

_GAIN_FACTOR = 3.0
"""Factor of a layer's gain over the median of the others from which it counts as scaled up."""

_WEIGHTS_CHANGE = 2.0
"""Factor, or its inverse, of a change of weights between two steps that counts as a cause."""

_HALF = 0.5


def verdict(alarm: Alarm, evidence: Evidence) -> Verdict:
    """Return the likely cause of ``alarm``.

    A learning rate that changed comes first, since it makes every other sign, and weights that
    something other than the optimizer has changed. A smaller batch follows, then the gradient or the
    loss of an odd batch, a layer whose weights began far larger than the others', which makes its
    neighbours sharp, a group whose learning rate is above the others' and whose weights ran away first,
    a warm-up that reached the limit, and then a layer that holds a sharpness above its limit.

    >>> from stableopt.recorder import StepRecord
    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> verdict(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The loss rose. The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    said = alarm.text[0].upper() + alarm.text[1:] + "."
    edge = _edge(evidence)
    beyond = f" {edge.text}" if edge is not None else ""
    jump = changed_rate(alarm, evidence)
    if jump is not None:
        layer = jump.layer or (edge.layer if edge is not None else None)
        return Verdict("learning rate", f"{said} {jump.text}{beyond}", layer, jump.step)
    changed = _changed_weights(alarm, evidence)
    if changed is not None:
        return Verdict("weights", f"{said} {changed.text}{beyond}", changed.layer, changed.step)
    smaller = _smaller_batch(evidence)
    if smaller is not None:
        return Verdict("batch size", f"{said} {smaller.text}{beyond}", None, smaller.step)
    odd = odd_batch(alarm, evidence, _WITHIN)
    runaway = runaway_group(evidence, alarm.step if odd is None else odd.step or alarm.step, odd)
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
    rising, near = warming_up(alarm, evidence), too_fast(alarm, evidence)
    if rising is not None and near is not None:
        text = f"{said} The learning rate {rising}. {beyond.strip() or near}{_unseen(evidence)}"
        return Verdict("learning rate", text, edge.layer if edge else None, alarm.step)
    if edge is not None:
        return Verdict(edge.cause, f"{said}{beyond}{_unseen(evidence)}", edge.layer, edge.step)
    if alarm.kind == "not finite":
        return Verdict("not finite", said, _not_finite_layer(evidence), alarm.step)
    unseen = _unseen(evidence)
    same = ["batch size"] if rising else ["learning rate", "batch size"]
    same += [] if unseen else ["gradients"]
    listed = " and ".join([", ".join(same[:-1]), same[-1]] if len(same) > 1 else same)
    verb = "were" if len(same) > 1 else "was"
    as_before = (
        f"{listed[0].upper()}{listed[1:]} {verb} as before, and no sharpness above its limit"
    )
    rose = f" The learning rate {rising}." if rising else ""
    return Verdict("unknown", f"{said} {as_before} was measured.{rose}{unseen}")


def _unseen(evidence: Evidence) -> str:
    """Return what the evidence cannot show where gradients are clipped."""
    ceiling = clipped_at(evidence)
    if ceiling is None:
        return ""
    return (
        f" Gradients are clipped at {ceiling:.3g}, where an odd batch leaves no mark in them: pass what"
        " clip_grad_norm_ returns, recorder.loss(loss, grad_norm=norm), to see it."
    )


def _changed_weights(alarm: Alarm, evidence: Evidence) -> Verdict | None:
    """Return the layer whose weights something other than the optimizer has changed most."""
    found: Verdict | None = None
    most = _WEIGHTS_CHANGE
    for its in evidence.steps:
        for layer, factor in its.changed.items() if alarm.step - its.step <= _WITHIN else ():
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


def _smaller_batch(evidence: Evidence) -> Verdict | None:
    sizes = [
        (its.step, its.margins.batch_size) for its in evidence.measured if its.margins.batch_size
    ]
    for (_, before), (step, after) in pairwise(sizes[-6:]):
        if before is not None and after is not None and before >= _BATCH_SIZE_DROP * after:
            text = f"The batch size fell from {before} to {after}, by step {step:,}."
            return Verdict("batch size", text, step=step)
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
