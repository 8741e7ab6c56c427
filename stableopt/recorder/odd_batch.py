"""`odd_batch`: the batch whose gradient or loss stands out; `clipped_at`: where gradients are clipped.

Recorded gradients are those that the optimizer sees. Where they are clipped, a batch shows in the norm
before clipping alone, which the training loop may report, and in its own loss, which no step could yet
react to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord, finite_or_inf, robust_score
from stableopt.recorder.finding import Verdict

__all__ = ["clipped_at", "odd_batch"]

_FEWEST, _MOST = 10, 50
"""Steps with which one is compared."""

_SCORE, _GRADIENT_LEAP = 10.0, 4.0
"""Robust standard deviations of the gradient, or loss, of an odd batch, and factor of its gradient over
the step before: a direction that grows by instability grows over several steps."""

_STANDS_OUT, _LATELY = 2.0, 20
"""Factor of an odd batch's gradient over the largest of so many steps before: ordinary ones vary."""

_LEAPS = 3.0
"""How many times the growth that a sharpness above its limit explains a leap of the gradient must be."""

_RATIOS = 2
"""Measurements that say how fast gradients grow. Adam's first ones are often far above the limit."""

_LOSS_LEAP, _LOSS_RISE = 3.0, 0.1
"""Factor of an odd batch's loss over the largest of those before, and its least height as a share of the
first loss."""

_RETURN = 0.1
"""Share of an odd batch's loss that the next one may have, where it is not as before: a loss that
instability raises stays high."""

_REPEATS = 5
"""Norms at the same ceiling from which gradients count as clipped."""

_ROUNDING = 1e-5
"""Relative distance of clipped norms: torch adds 1e-6 to the norm that it divides by. Twice the
precision of the gradients is added."""


def odd_batch(alarm: Alarm, evidence: Evidence, within: int) -> Verdict | None:
    """Return the first odd batch of the steps ``within`` so many before ``alarm``.

    The norm that the training loop reports comes first, then the norm that the optimizer sees, then
    the loss.

    >>> steps = [StepRecord(k, 0.1, 1.0, {"0": 9.0 if k == 30 else 1.0}) for k in range(1, 40)]
    >>> odd_batch(Alarm("loss", 39, "the loss rose"), Evidence(steps, []), 50).step
    30
    """
    recent = alarm.step - within
    reported = [its for its in evidence.steps if its.total_norm is not None]
    if len(reported) > _FEWEST:
        found = _by_gradient(evidence, reported, lambda its: its.total_norm or 0.0, recent)
    else:
        seen = [its for its in evidence.steps if its.grad_norms]
        found = _by_gradient(evidence, seen, lambda its: its.grad_norm, recent)
    return _by_loss(evidence, recent) if found is None else found


def _by_gradient(
    evidence: Evidence,
    steps: Sequence[StepRecord],
    norm_of: Callable[[StepRecord], float],
    recent: int,
) -> Verdict | None:
    for at in range(_FEWEST, len(steps)):
        its, norm = steps[at], norm_of(steps[at])
        before = [norm_of(one) for one in steps[max(0, at - _MOST) : at]]
        if its.step < recent or not all(map(math.isfinite, before)):
            continue
        leap = norm / max(before[-1], 1e-300)
        usual = max(_GRADIENT_LEAP, _LEAPS * _growth(evidence, its.step))
        stands_out = norm > _STANDS_OUT * max(before[-_LATELY:]) and leap > usual
        if not math.isfinite(norm) or (stands_out and robust_score(norm, before) > _SCORE):
            layer = max(its.grad_norms, key=lambda name: finite_or_inf(its.grad_norms[name]))
            text = (
                f"The gradient of the batch{_which(its)} at step {its.step:,} was {norm:.3g}, where"
                f" {median(before):.3g} was usual; it is largest in {layer}."
            )
            return Verdict("batch", text, layer, its.step)
    return None


def _by_loss(evidence: Evidence, recent: int) -> Verdict | None:
    known = [(its, its.loss) for its in evidence.steps if its.loss is not None]
    losses = [loss for _, loss in known]
    for at in range(_FEWEST, len(known)):
        its, loss = known[at]
        before, after = losses[max(0, at - _MOST) : at], losses[at + 1 : at + 2]
        if its.step < recent or not all(map(math.isfinite, [loss, *before])):
            continue
        usual, most = median(before), max(before)
        high = (
            # Instability raises a loss as the square of the gradient.
            loss > max(_LOSS_LEAP, _growth(evidence, its.step) ** 2) * most
            and robust_score(loss, before) > _SCORE
            and loss - usual > _LOSS_RISE * abs(evidence.first_loss or losses[0])
        )
        if high and all(one <= max(most, _RETURN * loss) for one in after):
            text = (
                f"The loss of the batch{_which(its)} at step {its.step:,} was {loss:.3g}, where"
                f" {usual:.3g} was usual, before any step could react to it."
            )
            return Verdict("batch", f"{text}{_unmarked(evidence)}", None, its.step)
    return None


def _unmarked(evidence: Evidence) -> str:
    ceiling = clipped_at(evidence)
    return (
        ""
        if ceiling is None
        else f" Gradients are clipped at {ceiling:.3g}, so their norm shows no odd batch."
    )


def clipped_at(evidence: Evidence) -> float | None:
    """Return the ceiling that the norm of the gradient reaches again and again, or ``None``.

    ``None`` also where the training loop reports the norm before clipping.

    >>> norms = [0.5, 1.0, 0.7, 1.0, 1.0, 0.3, 1.0, 1.0]
    >>> clipped_at(Evidence([StepRecord(k, 0.1, grad_norms={"0": n}) for k, n in enumerate(norms)], []))
    1.0
    """
    if sum(its.total_norm is not None for its in evidence.steps) > _FEWEST:
        return None
    norms = [its.grad_norm for its in evidence.steps[-_MOST:] if its.grad_norms]
    norms = [norm for norm in norms if math.isfinite(norm)]
    ceiling = max(norms, default=0.0)
    least = ceiling * (1 - _ROUNDING - 2 * evidence.precision)
    repeats = sum(norm >= least for norm in norms)
    return ceiling if ceiling > 0 and repeats >= _REPEATS else None


def _growth(evidence: Evidence, step: int) -> float:
    r"""Return the largest factor by which instability makes gradients grow in a step before ``step``.

    Along an eigenvector gradient descent multiplies the gradient by :math:`1-\eta\lambda`, whose size
    at r times the limit is :math:`2r-1`.
    """
    ratios = [its.ratio for its in evidence.measured if its.step < step and its.ratio is not None]
    return max([1.0, *(2 * ratio - 1 for ratio in ratios[-_RATIOS:])])


def _which(step: StepRecord) -> str:
    if step.batch is None:
        return ""
    more = ", …" if len(step.batch) > 8 else ""
    return f" of the samples {', '.join(map(str, step.batch[:8]))}{more}"
