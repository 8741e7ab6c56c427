"""`verdict`: what the evidence says about the cause of an alarm, in words."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
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
    """Return the likely cause of ``alarm``: the first of :data:`_SUSPECTS` that the evidence shows.

    >>> from stableopt.recorder import StepRecord
    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> verdict(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The loss rose. The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    scene = _Scene(alarm, evidence)
    found = next(filter(None, (suspect(scene) for suspect in _SUSPECTS)))
    said = alarm.text[0].upper() + alarm.text[1:] + "."
    return replace(found, text=f"{said} {found.text}".rstrip())


class _Scene:
    """An alarm, the evidence, and the findings that several suspects share."""

    def __init__(self, alarm: Alarm, evidence: Evidence) -> None:
        self.alarm, self.evidence = alarm, evidence
        self.edge = _edge(evidence)
        self.beyond = "" if self.edge is None else f" {self.edge.text}"

    @cached_property
    def odd(self) -> Verdict | None:
        """The odd batch."""
        return odd_batch(self.alarm, self.evidence, _WITHIN)

    @cached_property
    def runaway(self) -> Verdict | None:
        """The group whose weights ran away before the trouble began."""
        began = self.alarm.step if self.odd is None else self.odd.step or self.alarm.step
        return runaway_group(self.evidence, began, self.odd)

    @property
    def unseen(self) -> str:
        """What the evidence cannot show where gradients are clipped."""
        ceiling = clipped_at(self.evidence)
        if ceiling is None:
            return ""
        return (
            f" Gradients are clipped at {ceiling:.3g}, where an odd batch leaves no mark in them: pass"
            " what clip_grad_norm_ returns, recorder.loss(loss, grad_norm=norm), to see it."
        )


def _changed_rate(scene: _Scene) -> Verdict | None:
    found = changed_rate(scene.alarm, scene.evidence)
    if found is None:
        return None
    layer = found.layer or (scene.edge.layer if scene.edge is not None else None)
    return Verdict("learning rate", found.text + scene.beyond, layer, found.step)


def _weights(scene: _Scene) -> Verdict | None:
    found = _changed_weights(scene.alarm, scene.evidence)
    return None if found is None else replace(found, text=found.text + scene.beyond)


def _batch_size(scene: _Scene) -> Verdict | None:
    found = _smaller_batch(scene.evidence)
    return None if found is None else replace(found, text=found.text + scene.beyond)


def _batch(scene: _Scene) -> Verdict | None:
    odd, runaway = scene.odd, scene.runaway
    if odd is None or (runaway is not None and (runaway.step or 0) < (odd.step or 0)):
        return None
    return replace(odd, cause="batch")


def _layer(scene: _Scene) -> Verdict | None:
    evidence = scene.evidence
    scaled = _scaled_layer(evidence)
    early = not evidence.steps or evidence.steps[0].step == 1
    if scaled is None or not (early or scene.edge is not None):
        return None
    times = evidence.first_gains[scaled] / _others(evidence, scaled)
    text = (
        f"The weights of {scaled} were {times:.3g} times as large as those of the other layers when"
        f" recording began, for its number of inputs.{scene.beyond}"
    )
    return Verdict("layer", text, scaled, scene.alarm.step)


def _runaway(scene: _Scene) -> Verdict | None:
    found = scene.runaway
    return found and replace(found, cause="learning rate", text=found.text + scene.beyond)


def _warm_up(scene: _Scene) -> Verdict | None:
    rising = warming_up(scene.alarm, scene.evidence)
    near = too_fast(scene.alarm, scene.evidence)
    if rising is None or near is None:
        return None
    text = f"The learning rate {rising}. {scene.beyond.strip() or near}{scene.unseen}"
    layer = None if scene.edge is None else scene.edge.layer
    return Verdict("learning rate", text, layer, scene.alarm.step)


def _sharp(scene: _Scene) -> Verdict | None:
    return scene.edge and replace(scene.edge, text=scene.edge.text + scene.unseen)


def _not_finite(scene: _Scene) -> Verdict | None:
    if scene.alarm.kind != "not finite":
        return None
    return Verdict("not finite", "", _not_finite_layer(scene.evidence), scene.alarm.step)


def _unknown(scene: _Scene) -> Verdict:
    """Return what was as before."""
    rising = warming_up(scene.alarm, scene.evidence)
    same = ["batch size"] if rising else ["learning rate", "batch size"]
    same += [] if scene.unseen else ["gradients"]
    listed = " and ".join([", ".join(same[:-1]), same[-1]] if len(same) > 1 else same)
    verb = "were" if len(same) > 1 else "was"
    rose = f" The learning rate {rising}." if rising else ""
    text = f"{listed[0].upper()}{listed[1:]} {verb} as before, and no sharpness above its limit"
    return Verdict("unknown", f"{text} was measured.{rose}{scene.unseen}")


_SUSPECTS = (
    _changed_rate,  # first, since it makes every other sign
    _weights,  # something other than the optimizer has changed them
    _batch_size,
    _batch,
    _layer,  # its weights began far larger than the others', which makes its neighbours sharp
    _runaway,  # a group with a higher rate, whose weights ran away first
    _warm_up,
    _sharp,
    _not_finite,
    _unknown,
)
"""What may have caused an alarm, in the order in which it is asked for; the last one always answers."""


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
