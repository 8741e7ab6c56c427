r"""Control laws for the batch size: pure functions of a measurement and a state.

A law is ``law(measured, state) -> (decision, state)``, as in :mod:`~stableopt.steering.lr_laws`. A
smaller batch lowers the limit on the non-uniformity, for plain SGD
:math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, and so makes the less uniform minima unstable.

The limit is a side of the box (9), which in several dimensions is neither necessary nor sufficient.
So the staircase goes to this limit first and then on, until the measured non-uniformity is within
the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stableopt.stability import StabilityMargins, UpdateRule
from stableopt.steering.decision import Decision, Kind
from stableopt.steering.lr_laws import TRIES, UNCONVERGED, State, why_diverging, why_unusable
from stableopt.steering.target import TargetRegion

__all__ = ["BatchLaw", "BatchMeasured", "batch_staircase", "keep_batch_margin"]

AVERAGED = 16
"""Measurements in an average. It has a quarter of one measurement's error or less."""


@dataclass(frozen=True)
class BatchMeasured:
    """The input of a law for the batch size.

    Attributes:
        margins: the fresh measurement.
        rule: the present update rule.
        target: the region, absolute or a share of the limits.
        batch_size: the present number of samples in a step, of all ranks together.
        dataset_size: the number of samples n in the data set.
        smallest: the smallest allowed batch size.
        largest: the largest allowed batch size.
        loss_cap: the loss above which training counts as diverging, or infinity.
    """

    margins: StabilityMargins
    rule: UpdateRule
    target: TargetRegion
    batch_size: int
    dataset_size: int
    smallest: int = 1
    largest: int | None = None
    loss_cap: float = math.inf

    def limit(self, batch_size: int) -> float:
        """Return the largest stable non-uniformity at a batch size."""
        size = min(max(batch_size, 1), self.dataset_size)
        return self.rule.max_non_uniformity(size, self.dataset_size)

    def decide(self, kind: Kind, batch_size: float, why: str) -> Decision:
        """Return a decision for ``batch_size``; a new size is clipped to the allowed ones."""
        now, margins = self.batch_size, self.margins
        size = int(batch_size)
        if size != now:
            most = self.dataset_size if self.largest is None else self.largest
            size = min(max(size, self.smallest), most, self.dataset_size)
        measured, limit = margins.non_uniformity, self.limit(now)
        return Decision("batch_size", kind, now, size, why, measured, limit, margins.step)


BatchLaw: TypeAlias = Callable[[BatchMeasured, State], tuple[Decision, State]]


def batch_staircase(
    measured: BatchMeasured,
    state: State,
    *,
    band: float = 0.05,
    factor: float = 0.5,
    gate: float = 1.2,
    last_gate: float = 1.4,
    dwell: int = 100,
    patience: int = 300,
    tries: int = TRIES,
) -> tuple[Decision, State]:
    r"""Move to the batch size whose limit is the target, and on until s is within the target.

    Here s is the average of the measurements since the last change, so that noise in them does not
    lower B again and again. Of k measurements it counts as outside of a bound if it is off by more
    than :math:`\max(1, 4/\sqrt k)` times ``band``: 20 % for one and 5 % from sixteen on.

    The law

    - multiplies B by ``factor`` if s is above the target's upper bound by more than the band, down to
      :meth:`~TargetRegion.batch_size_for`, and from there by sqrt(``factor``) while s stays above.
      It stops where s would be more than ``gate`` times its limit, since more noise would scatter
      the weights. If this gate holds for ``patience`` steps, and s would be within ``last_gate``
      times its limit at a smaller size, it takes that size: below ten samples sizes are far apart;
    - divides B by ``factor`` if s is below the lower bound by more than the band;
    - keeps B in between;
    - waits ``dwell`` steps after a change for its effect;
    - divides B by ``factor`` if the loss is not finite or above the cap; after ``tries`` such
      failures it never lowers B again.

    >>> margins = StabilityMargins(step=10, non_uniformity=6.0)
    >>> target = TargetRegion(non_uniformity=(0, 4.0))
    >>> at = BatchMeasured(margins, UpdateRule(lr=0.5), target, batch_size=64, dataset_size=1000)
    >>> batch_staircase(at, {})[0].new
    32
    """
    margins, now = measured.margins, measured.batch_size
    step = margins.step
    waiting = step < state.get("until", -math.inf)
    forgotten = ("held", "mean", "count")
    settled: State = {k: v for k, v in state.items() if k not in forgotten} | {
        "until": step + dwell
    }
    diverging = why_diverging(margins, measured.loss_cap)
    if diverging is not None and not waiting:
        settled = {**settled, "raises": state.get("raises", 0) + 1}
        return measured.decide("raise", math.ceil(now / factor), diverging), settled
    wait = diverging or _unusable(margins)
    if wait is not None:
        return measured.decide("hold", now, wait), state
    assert margins.non_uniformity is not None
    if waiting:  # the average starts after the change has taken effect
        s, tolerance = margins.non_uniformity, band
    else:
        s, tolerance, state = _averaged(margins.non_uniformity, state, band)
    low, high = measured.target.bounds("non_uniformity")
    if low * (1 - tolerance) <= s <= high * (1 + tolerance):
        return measured.decide("keep", now, "the non-uniformity is within the target"), state
    side, bound = ("above", high) if s > high else ("below", low)
    why = f"the non-uniformity {s:.3g} is {side} the target's {bound:.3g}"
    if waiting:
        return measured.decide("hold", now, f"{why}; the last change still takes effect"), state
    if side == "below":
        return measured.decide("raise", math.ceil(now / factor), why), settled
    if state.get("raises", 0) >= tries:
        why = f"{why}; smaller batches diverged {state['raises']:.0f} times"
        return measured.decide("hold", now, why), state
    if now <= measured.smallest:
        return measured.decide("hold", now, f"{why}; no smaller batch is allowed"), state
    seed = measured.target.batch_size_for(measured.rule, measured.dataset_size)
    # Below the seed the box already forbids s, which may just be slow: smaller steps.
    smaller = max(now * factor, seed) if now > seed else now * factor**0.5
    least = _least(measured, s / gate)
    if now <= least:
        since = state.get("held", step)
        if step - since < patience or now <= (least := _least(measured, s / last_gate)):
            ratio = s / measured.limit(now)
            why = f"{why}; it is {ratio:.2f} of its limit, at the gate: escaping"
            return measured.decide("hold", now, why), {**state, "held": since}
    smaller = max(math.floor(smaller), measured.smallest, least)
    return measured.decide("lower", smaller, why), settled


def keep_batch_margin(
    measured: BatchMeasured, state: State, *, band: float = 0.05, dwell: int = 100
) -> tuple[Decision, State]:
    """Raise the batch size if the non-uniformity is above a share of its limit; never lower it.

    The non-uniformity is averaged, and compared with a tolerance of ``band``, as in
    :func:`batch_staircase`. Noise alone would otherwise raise B again and again.

    >>> margins = StabilityMargins(step=1, non_uniformity=4.0)
    >>> target = TargetRegion.within_limits(0.5)
    >>> at = BatchMeasured(margins, UpdateRule(lr=0.5), target, batch_size=4, dataset_size=1000)
    >>> keep_batch_margin(at, {})[0].new        # the limit at 16 is 8.06
    16
    """
    margins, now, share = measured.margins, measured.batch_size, measured.target.share
    if share is None:
        raise ValueError(
            f"target {measured.target}: keep_batch_margin needs TargetRegion.within_limits(share)"
        )
    wait = _unusable(margins)
    if wait is not None:
        return measured.decide("hold", now, wait), state
    assert margins.non_uniformity is not None
    s, tolerance = margins.non_uniformity, band
    waiting = margins.step < state.get("until", -math.inf)
    if not waiting:
        s, tolerance, state = _averaged(s, state, band)
    ratio = s / measured.limit(now)
    why = f"the non-uniformity is {ratio:.2f} of its limit, to be at most {share:g}"
    within = ratio <= share * (1 + tolerance)
    if within or waiting:
        return measured.decide("keep" if within else "hold", now, why), state
    wanted = TargetRegion(non_uniformity=(s / share, None))
    size = wanted.batch_size_for(measured.rule, measured.dataset_size)
    return measured.decide("raise", max(size, now), why), {"until": margins.step + dwell}


def _averaged(value: float, state: State, band: float) -> tuple[float, float, State]:
    """Return the average of the measurements up to ``value``, its tolerance and the new state.

    Single measurements may be off by 10 %; the average of k is off by 10 % / sqrt(k).
    """
    count = min(state.get("count", 0) + 1, AVERAGED)
    mean = state.get("mean", value)
    mean += (value - mean) / count
    return mean, band * max(1.0, 4 / math.sqrt(count)), {**state, "mean": mean, "count": count}


def _least(measured: BatchMeasured, limit: float) -> int:
    """Return the smallest batch size whose limit on the non-uniformity is at least ``limit``."""
    allowed = TargetRegion(non_uniformity=(limit, None))
    return allowed.batch_size_for(measured.rule, measured.dataset_size)


def _unusable(margins: StabilityMargins) -> str | None:
    why = why_unusable(margins, "non-uniformity", margins.non_uniformity)
    return why if why or margins.converged else UNCONVERGED
