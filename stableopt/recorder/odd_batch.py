"""`odd_batch`: the batch with an outlying gradient or loss; `clipped_at`: the threshold of clipping.

The recorder sees gradients after clipping. A batch whose gradient was clipped stands out only by its
norm before clipping, which the training loop may report, and by its loss, computed before its step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord, robust_score
from stableopt.recorder.finding import Verdict
from stableopt.recorder.learning_rate import moved_far_in

__all__ = ["clipped_at", "odd_batch"]

_MIN_HISTORY, _MAX_HISTORY = 10, 50
"""Smallest and largest number of earlier steps with which a step is compared."""

_SCORE, _GRADIENT_JUMP = 10.0, 4.0
"""Robust standard deviations of an odd batch's gradient, or loss, and factor of its gradient over the
one before: instability needs several steps for such a growth."""

_STANDS_OUT, _RECENT_STEPS = 2.0, 20
"""Factor of an odd batch's gradient over the largest gradient of so many steps before."""

_BEYOND_GROWTH = 3.0
"""Factor of an odd batch's jump over the growth that a sharpness above its limit explains."""

_RATIOS = 2
"""Latest measurements that count for the growth: Adam's first ones are often far above the limit."""

_JUST_BEFORE, _RISING = 3, 2.0
"""Number of steps just before a batch, and factor of the mean of their losses over the usual, from which
a sharpness above its limit is the likelier cause: an odd batch comes without notice."""

_LOSS_JUMP, _LOSS_RISE = 3.0, 0.1
"""Factor of an odd batch's loss over the largest loss before, and its smallest rise as a share of the
loss at the start."""

_RETURN = 0.1
"""Largest share of an odd batch's loss that the next batch may have, if that is above all losses before:
a loss that instability raises stays high."""

_REPEATS = 5
"""Norms at the same ceiling from which gradients count as clipped."""

_ROUNDING = 1e-5
"""Relative distance between clipped norms, plus twice the precision of the gradients: torch adds 1e-6 to
the norm that it divides by."""


def odd_batch(alarm: Alarm, evidence: Evidence, within: int) -> Verdict | None:
    """Return the first odd batch among the last ``within`` steps before ``alarm``.

    It is searched for in the norms that the training loop reports, or without them in those that the
    optimizer sees, and then in the losses.

    >>> steps = [StepRecord(k, 0.1, 1.0, {"0": 9.0 if k == 30 else 1.0}) for k in range(1, 40)]
    >>> odd_batch(Alarm("loss", 39, "the loss rose"), Evidence(steps, []), 50).step
    30
    """
    recent = alarm.step - within
    reported = [record for record in evidence.steps if record.total_norm is not None]
    if len(reported) > _MIN_HISTORY:
        norms = [(record, record.total_norm or 0.0) for record in reported]
    else:
        norms = [(record, record.grad_norm) for record in evidence.steps if record.grad_norms]
    return _by_gradient(evidence, norms, recent) or _by_loss(evidence, recent)


def _by_gradient(
    evidence: Evidence, steps: Sequence[tuple[StepRecord, float]], recent: int
) -> Verdict | None:
    """Return the first step from ``recent`` on whose norm stands out; ``steps`` pairs both."""
    norms = [norm for _, norm in steps]
    for index in range(_MIN_HISTORY, len(steps)):
        (record, norm), before = steps[index], norms[max(0, index - _MAX_HISTORY) : index]
        if record.step < recent or not all(map(math.isfinite, before)):
            continue
        if _was_unstable(evidence, record.step):
            continue
        jump = norm / max(before[-1], 1e-300)
        smallest_jump = max(_GRADIENT_JUMP, _BEYOND_GROWTH * _growth(evidence, record.step))
        stands_out = norm > _STANDS_OUT * max(before[-_RECENT_STEPS:]) and jump > smallest_jump
        if not math.isfinite(norm) or (stands_out and robust_score(norm, before) > _SCORE):
            layer, place = _place(record)
            text = (
                f"The gradient of the batch{_samples(record)} at step {record.step:,} was {norm:.3g},"
                f" where {median(before):.3g} was usual{place}."
            )
            return Verdict("batch", text, layer, record.step)
    return None


def _place(record: StepRecord) -> tuple[str | None, str]:
    """Return the layer where the gradient is largest, or alone not finite, and a clause on it.

    A loss that is not finite gives all layers gradients that are not finite, and so does clipping.
    """
    norms = record.grad_norms
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not norms or len(bad) == len(norms):  # a step that a scaler skips has no gradients
        return None, "; it is not finite in any layer" if bad else ""
    if bad:
        return bad[0], f"; it is not finite in {', '.join(bad[:3])}"
    layer = max(norms, key=lambda name: norms[name])
    return layer, f"; it is largest in {layer}"


def _by_loss(evidence: Evidence, recent: int) -> Verdict | None:
    """Return the first step from ``recent`` on whose loss alone is high."""
    steps = [(record, record.loss) for record in evidence.steps if record.loss is not None]
    losses = [loss for _, loss in steps]
    for index in range(_MIN_HISTORY, len(steps)):
        (record, loss), before = steps[index], losses[max(0, index - _MAX_HISTORY) : index]
        if record.step < recent or not all(map(math.isfinite, [loss, *before])):
            continue
        usual, most = median(before), max(before)
        high = (
            # Instability raises the loss by the square of the gradient's growth.
            loss > max(_LOSS_JUMP, _growth(evidence, record.step) ** 2) * most
            and robust_score(loss, before) > _SCORE
            and loss - usual > _LOSS_RISE * abs(evidence.first_loss or losses[0])
        )
        if index + 1 < len(losses):
            is_passing = losses[index + 1] <= max(most, _RETURN * loss)
        else:  # the next batch is not known yet
            is_passing = _growth(evidence, record.step) == 1
        if high and is_passing and not _was_unstable(evidence, record.step):
            text = (
                f"The loss of the batch{_samples(record)} at step {record.step:,} was {loss:.3g},"
                f" where {usual:.3g} was usual, before the optimizer's step on it."
            )
            ceiling = clipped_at(evidence)
            if ceiling is not None:
                text += (
                    f" Gradients are clipped at {ceiling:.3g}, so their norm shows no odd batch."
                )
            return Verdict("batch", text, None, record.step)
    return None


def clipped_at(evidence: Evidence) -> float | None:
    """Return the largest norm of the gradient if many steps have the same one, else ``None``.

    ``None`` also if the training loop reports the norm before clipping.

    >>> norms = [0.5, 1.0, 0.7, 1.0, 1.0, 0.3, 1.0, 1.0]
    >>> clipped_at(Evidence([StepRecord(k, 0.1, grad_norms={"0": n}) for k, n in enumerate(norms)], []))
    1.0
    """
    if sum(record.total_norm is not None for record in evidence.steps) > _MIN_HISTORY:
        return None
    norms = [record.grad_norm for record in evidence.steps[-_MAX_HISTORY:] if record.grad_norms]
    norms = [norm for norm in norms if math.isfinite(norm)]
    ceiling = max(norms, default=0.0)
    lowest = ceiling * (1 - _ROUNDING - 2 * evidence.precision)
    repeats = sum(norm >= lowest for norm in norms)
    return ceiling if ceiling > 0 and repeats >= _REPEATS else None


def _growth(evidence: Evidence, step: int) -> float:
    r"""Return the largest growth of the gradient per step that the ratios before ``step`` explain.

    Along an eigenvector gradient descent multiplies the gradient by :math:`1-\eta\lambda`, which is
    :math:`1-2r` for a sharpness of r times its limit.
    """
    measured = [record for record in evidence.measured if record.step < step]
    ratios = [record.ratio for record in measured if record.ratio is not None]
    return max([1.0, *(2 * ratio - 1 for ratio in ratios[-_RATIOS:])])


def _was_unstable(evidence: Evidence, step: int) -> bool:
    """Return whether training was unstable before ``step``, which then explains a jump at it.

    The signs are a sharpness above its limit, and just before ``step`` weights that moved far, or
    losses that rose. Gradients also grow where training begins to learn, which is not a sign. The
    sharpness may have crossed its limit after the last measurement before ``step``, so the next one
    counts too: an odd batch can leave a large sharpness behind, but no such signs before it.
    """
    ratios = [
        (record.step, record.ratio) for record in evidence.measured if record.ratio is not None
    ]
    earlier = [ratio for measured, ratio in ratios if measured < step][-_RATIOS:]
    later = [ratio for measured, ratio in ratios if measured >= step][:1]
    if max([*earlier, *later], default=0.0) <= 1:
        return False
    moved_far = any(
        moved_far_in(record) for record in evidence.steps if 0 < step - record.step <= _JUST_BEFORE
    )
    losses = [record.loss for record in evidence.steps if record.step < step]
    before = [loss for loss in losses[-_MAX_HISTORY:] if loss is not None]
    if moved_far or not before:
        return moved_far
    usual = median(before)  # a policy's loss may be negative
    return fmean(before[-_JUST_BEFORE:]) - usual > (_RISING - 1) * abs(usual)


def _samples(record: StepRecord) -> str:
    """Return the samples of a batch for a sentence, at most eight."""
    if record.batch is None:
        return ""
    more = ", …" if len(record.batch) > 8 else ""
    return f" of the samples {', '.join(map(str, record.batch[:8]))}{more}"
