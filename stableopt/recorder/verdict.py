"""`verdict`: the likely cause of an alarm, from the evidence."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from statistics import median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, MeasuredRecord
from stableopt.recorder.finding import Cause, Verdict
from stableopt.recorder.learning_rate import (
    changed_rate,
    high_from_the_start,
    runaway_group,
    too_fast,
    warming_up,
)
from stableopt.recorder.odd_batch import clipped_at, odd_batch

__all__ = ["Verdict", "verdict"]

_WITHIN = 50
"""Steps before the alarm that are searched for a cause."""

_BATCH_SIZE_DROP = 1.5
"""Factor between two batch sizes that counts as a cause."""

_GAIN_FACTOR = 3.0
"""Factor of a layer's gain over the median of the other layers that counts as a cause."""

_WEIGHTS_CHANGE = 2.0
"""Factor, or its inverse, of the norm of weights between two steps that counts as a cause."""

_MAJORITY = 0.5
"""Share of the top eigenvector from which one layer is the cause of a large sharpness."""


def verdict(alarm: Alarm, evidence: Evidence) -> Verdict:
    """Return the likely cause of ``alarm``: the first of :data:`_CAUSES` that the evidence supports.

    >>> from stableopt.recorder import StepRecord
    >>> steps = [StepRecord(k, 0.1 if k < 40 else 0.3) for k in range(50)]
    >>> verdict(Alarm("loss", 50, "the loss rose"), Evidence(steps, [])).text
    'The loss rose. The learning rate rose from 0.1 to 0.3 at step 40.'
    """
    case = _Case(alarm, evidence)
    cause = next(filter(None, (find_cause(case) for find_cause in _CAUSES)))
    event = alarm.text[0].upper() + alarm.text[1:] + "."
    return replace(cause, text=f"{event} {cause.text}".rstrip())


class _Case:
    """An alarm, its evidence, and the findings that several causes share."""

    def __init__(self, alarm: Alarm, evidence: Evidence) -> None:
        self.alarm, self.evidence = alarm, evidence
        self.edge = _edge(evidence)
        self.edge_text = "" if self.edge is None else f" {self.edge.text}"

    @cached_property
    def odd(self) -> Verdict | None:
        """The odd batch."""
        return odd_batch(self.alarm, self.evidence, _WITHIN)

    @cached_property
    def runaway(self) -> Verdict | None:
        """The group whose weights moved far before the odd batch, or else before the alarm."""
        trouble = self.alarm.step if self.odd is None else self.odd.step or self.alarm.step
        return runaway_group(self.evidence, trouble, self.odd)

    @cached_property
    def high_rate(self) -> str | None:
        """A sentence on a learning rate that has been too high since the first measurement."""
        if self.edge is None or self.edge.step != self.evidence.measured[0].step:
            return None
        return high_from_the_start(self.alarm, self.evidence)

    @property
    def clipping_text(self) -> str:
        """A sentence on odd batches, which the evidence cannot show if gradients are clipped."""
        ceiling = clipped_at(self.evidence)
        if ceiling is None:
            return ""
        return (
            f" Gradients are clipped at {ceiling:.3g}, so they show no odd batch: pass the norm that"
            " clip_grad_norm_ returns to recorder.loss(loss, grad_norm=norm)."
        )


def _changed_rate(case: _Case) -> Verdict | None:
    rise = changed_rate(case.alarm, case.evidence)
    if rise is None:
        return None
    layer = rise.layer or (case.edge.layer if case.edge is not None else None)
    return Verdict("learning rate", rise.text + case.edge_text, layer, rise.step)


def _changed_weights(case: _Case) -> Verdict | None:
    """Return the layer whose weights something other than the optimizer changed most."""
    cause: Verdict | None = None
    most = _WEIGHTS_CHANGE
    for record in case.evidence.steps:
        if case.alarm.step - record.step > _WITHIN:
            continue
        for layer, factor in record.changed.items():
            size = max(factor, 1 / factor) if factor > 0 else math.inf
            if size >= most:
                several = len(record.changed)
                more = f" (one of {several} layers that changed)" if several > 1 else ""
                text = (
                    f"Before step {record.step:,} something other than the optimizer changed the weights"
                    f" of {layer}: their norm is {factor:.3g} times what it was{more}.{case.edge_text}"
                )
                most, cause = size, Verdict("weights", text, layer, record.step)
    return cause


def _batch_size(case: _Case) -> Verdict | None:
    measured = case.evidence.measured
    sizes = [(m.step, m.margins.batch_size) for m in measured if m.margins.batch_size]
    for (_, before), (step, after) in pairwise(sizes[-6:]):
        if before is not None and after is not None and before >= _BATCH_SIZE_DROP * after:
            text = (
                f"The batch size fell from {before} to {after}, by step {step:,}.{case.edge_text}"
            )
            return Verdict("batch size", text, step=step)
    return None


def _batch(case: _Case) -> Verdict | None:
    odd, runaway = case.odd, case.runaway
    if odd is None or (runaway is not None and (runaway.step or 0) < (odd.step or 0)):
        return None
    return odd


def _layer(case: _Case) -> Verdict | None:
    steps, gains = case.evidence.steps, case.evidence.first_gains
    from_the_start = not steps or steps[0].step == 1
    if len(gains) < 2 or not (from_the_start or case.edge is not None):
        return None
    layer = max(gains, key=lambda name: gains[name])
    others = max(median(gain for name, gain in gains.items() if name != layer), 1e-300)
    if not gains[layer] > _GAIN_FACTOR * others:
        return None
    text = (
        f"The weights of {layer} were {gains[layer] / others:.3g} times as large as those of the other"
        f" layers when recording began, relative to its number of inputs.{case.edge_text}"
    )
    if case.high_rate is not None:
        text = f"{text} {case.high_rate}"
    return Verdict("layer", text, layer, case.alarm.step)


def _runaway(case: _Case) -> Verdict | None:
    runaway = case.runaway
    if runaway is None:
        return None
    return replace(runaway, text=runaway.text + case.edge_text)


def _warm_up(case: _Case) -> Verdict | None:
    rising = warming_up(case.alarm, case.evidence)
    near = too_fast(case.alarm, case.evidence)
    if rising is None or near is None:
        return None
    text = f"The learning rate {rising}. {case.edge_text.strip() or near}{case.clipping_text}"
    layer = None if case.edge is None else case.edge.layer
    return Verdict("learning rate", text, layer, case.alarm.step)


def _high_rate(case: _Case) -> Verdict | None:
    edge, text = case.edge, case.high_rate
    if edge is None or text is None:
        return None
    return Verdict("learning rate", text + case.edge_text + case.clipping_text, edge.layer, 1)


def _sharp(case: _Case) -> Verdict | None:
    edge = case.edge
    return None if edge is None else replace(edge, text=edge.text + case.clipping_text)


def _not_finite(case: _Case) -> Verdict | None:
    if case.alarm.kind != "not finite":
        return None
    norms = [pair for record in case.evidence.steps for pair in record.grad_norms.items()]
    layer = next((layer for layer, norm in norms if not math.isfinite(norm)), None)
    return Verdict("not finite", "", layer, case.alarm.step)


def _unknown(case: _Case) -> Verdict:
    """Return a verdict that names what did not change."""
    rising = warming_up(case.alarm, case.evidence)
    same = ["batch size"] if rising else ["learning rate", "batch size"]
    same += [] if case.clipping_text else ["gradients"]
    listed = same[0] if len(same) == 1 else f"{', '.join(same[:-1])} and {same[-1]}"
    verb = "was" if len(same) == 1 else "were"
    rose = f" The learning rate {rising}." if rising else ""
    text = f"{listed[0].upper()}{listed[1:]} {verb} as before, and no sharpness above its limit"
    return Verdict("unknown", f"{text} was measured.{rose}{case.clipping_text}")


_CAUSES = (
    _changed_rate,  # first, since it can produce the signs of every other cause
    _changed_weights,
    _batch_size,
    _batch,
    _layer,  # weights that start far larger than those of other layers make the neighbours sharp
    _runaway,  # a group with a higher rate, whose weights move far first
    _warm_up,
    _high_rate,  # after warm-up and groups, which say more about the rate
    _sharp,
    _not_finite,
    _unknown,
)
"""The possible causes of an alarm, in the order in which they are tried; the last one always applies."""


def _edge(evidence: Evidence) -> Verdict | None:
    """Return the verdict on the measurement since which the sharpness is above its limit."""
    over: MeasuredRecord | None = None
    for record in reversed(evidence.measured):
        if record.ratio is None:
            continue
        if record.ratio <= 1:
            break
        over = record
    if over is None:
        return None
    assert over.ratio is not None
    margins = over.margins
    name = "sharpness" if margins.preconditioned_sharpness is None else "preconditioned sharpness"
    verb = "was" if over is evidence.measured[0] else "crossed its limit and was"
    text = f"The {name} {verb} {over.ratio:.3g} times its limit at step {over.step:,}"
    layer, share = next(iter(over.shares.items()), (None, 0.0))
    text += f", {share:.0%} of it in {layer}." if layer else "."
    cause: Cause = "layer" if share >= _MAJORITY else "edge"
    return Verdict(cause, text, layer, over.step)
