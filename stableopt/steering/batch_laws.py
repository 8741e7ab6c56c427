r"""Control laws for the batch size: pure functions of a measurement and a state.

A law is ``law(measured, state) -> (decision, state)``, as in :mod:`~stableopt.steering.lr_laws`. A
smaller batch lowers the limit on the non-uniformity, for plain SGD
:math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, and so makes less uniform minima unstable.

The limit is a side of the box (9) of Wu, Ma & E (2018), which in several dimensions is neither necessary
nor sufficient for stability. So the staircase lowers B until this limit is the target, and then further
until the measured non-uniformity is within the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stableopt.stability import StabilityMargins, UpdateRule
from stableopt.stability.measure.measurement import ratio_to_limit
from stableopt.steering.decision import Decision, Kind, kind_of_change
from stableopt.steering.law_state import State, at_step, without
from stableopt.steering.lr_laws import TRIES, UNCONVERGED, why_diverging, why_unusable
from stableopt.steering.target import TargetRegion

__all__ = ["BatchLaw", "BatchMeasured", "batch_staircase", "keep_batch_margin"]

AVERAGED = 16
"""Measurements in the running average, whose error is then at most a quarter of that of one."""


@dataclass(frozen=True)
class BatchMeasured:
    """The input of a law for the batch size.

    Attributes:
        margins: the fresh measurement.
        rule: the present update rule.
        target: the region, absolute or a share of the limits.
        batch_size: the present number of samples in a step, over all ranks.
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

    @property
    def most(self) -> int:
        """The largest size in effect: ``largest``, or the whole data set."""
        return self.dataset_size if self.largest is None else min(self.largest, self.dataset_size)

    def limit(self, batch_size: int) -> float:
        """Return the largest stable non-uniformity at a batch size."""
        size = min(max(batch_size, 1), self.dataset_size)
        return self.rule.max_non_uniformity(size, self.dataset_size)

    def decide(self, kind: Kind, batch_size: float, why: str) -> Decision:
        """Return a decision for ``batch_size``; a new size is clipped to the allowed range.

        If clipping prevents or reverses the change, ``kind`` is that of the actual change.
        """
        present, margins = self.batch_size, self.margins
        size = int(batch_size)
        if size != present:
            size = min(max(size, self.smallest), self.most)
        kind = kind_of_change(kind, present, size)
        measured, limit = margins.non_uniformity, self.limit(present)
        return Decision("batch_size", kind, present, size, why, measured, limit, margins.step)


BatchLaw: TypeAlias = Callable[[BatchMeasured, State], tuple[Decision, State]]
"""``law(measured, state) -> (decision, state)``."""


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
    r"""Move to the batch size whose limit is the target, and further until s is within the target.

    Here s is the average of the measurements since the last change, so that noise does not lower B
    again and again. The average of k measurements counts as outside of a bound if it is off by more
    than :math:`\max(1, 4/\sqrt k)` times ``band``: 20 % for one measurement, 5 % from sixteen on.

    The law

    - multiplies B by ``factor`` if s is above the target's upper bound by more than the band, down to
      :meth:`~TargetRegion.batch_size_for`, and from there by sqrt(``factor``) while s stays above.
      It holds B where s would be more than ``gate`` times its limit at a smaller size, since more
      noise would scatter the weights. If it has held for ``patience`` steps, it takes a smaller size
      at which s is at most ``last_gate`` times its limit: below ten samples sizes are far apart;
    - divides B by ``factor`` if s is below the lower bound by more than the band;
    - keeps B in between;
    - waits ``dwell`` steps after a change for its effect;
    - divides B by ``factor`` if the loss is not finite or above the cap; after ``tries`` such
      failures it never lowers B again.

    >>> margins = StabilityMargins(step=10, non_uniformity=6.0)
    >>> target = TargetRegion(non_uniformity=(0, 4.0))
    >>> rule = UpdateRule(lr=0.5)
    >>> measured = BatchMeasured(margins, rule, target, batch_size=64, dataset_size=1000)
    >>> batch_staircase(measured, {})[0].new
    32
    """
    margins, present = measured.margins, measured.batch_size
    step = margins.step
    state = at_step(state, step, "until", "held")
    waiting = step < state.get("until", -math.inf)
    # The state after a change.
    changed: State = {**without(state, "held", "mean", "count"), "until": step + dwell}
    diverging = why_diverging(margins, measured.loss_cap)
    if diverging is not None and not waiting:
        changed = {**changed, "raises": state.get("raises", 0) + 1}
        return measured.decide("raise", math.ceil(present / factor), diverging), changed
    reason = diverging or _unusable(margins)
    if reason is not None:
        return measured.decide("hold", present, reason), state
    assert margins.non_uniformity is not None
    if waiting:  # the average starts after the change has taken effect
        s, tolerance = margins.non_uniformity, band
    else:
        s, tolerance, state = _averaged(margins.non_uniformity, state, band)
    low, high = measured.target.bounds("non_uniformity")
    if low * (1 - tolerance) <= s <= high * (1 + tolerance):
        return measured.decide("keep", present, "the non-uniformity is within the target"), state
    side, bound = ("above", high) if s > high else ("below", low)
    why = f"the non-uniformity {s:.3g} is {side} the target's {bound:.3g}"
    if waiting:
        return measured.decide("hold", present, f"{why}; the last change still takes effect"), state
    if side == "below" and present >= measured.most:
        return measured.decide("hold", present, f"{why}; no larger batch is allowed"), state
    if side == "below":
        return measured.decide("raise", math.ceil(present / factor), why), changed
    if state.get("raises", 0) >= tries:
        why = f"{why}; smaller batches diverged {state['raises']:.0f} times"
        return measured.decide("hold", present, why), state
    if present <= measured.smallest:
        return measured.decide("hold", present, f"{why}; no smaller batch is allowed"), state
    target_size = measured.target.batch_size_for(measured.rule, measured.dataset_size)
    gate_size = _smallest_size(measured, s / gate)
    if present <= gate_size:
        held_since = state.get("held", step)
        gate_size = _smallest_size(measured, s / last_gate)
        if step - held_since < patience or present <= gate_size:
            ratio = ratio_to_limit(s, measured.limit(present))
            why = f"{why}; it is {ratio:.2f} of its limit: a smaller batch would pass the gate"
            return measured.decide("hold", present, why), {**state, "held": held_since}
    smaller = max(present * factor, target_size)
    if present <= target_size:  # the box forbids s already, and its escape may just be slow
        smaller = present * factor**0.5
    size = max(math.floor(smaller), measured.smallest, gate_size)
    return measured.decide("lower", size, why), changed


def keep_batch_margin(
    measured: BatchMeasured, state: State, *, band: float = 0.05, dwell: int = 100
) -> tuple[Decision, State]:
    """Raise the batch size if the non-uniformity is above a share of its limit; never lower it.

    The non-uniformity is averaged, and compared with a tolerance of ``band``, as in
    :func:`batch_staircase`. Otherwise noise alone would raise B again and again.

    >>> margins = StabilityMargins(step=1, non_uniformity=4.0)
    >>> rule, target = UpdateRule(lr=0.5), TargetRegion.within_limits(0.5)
    >>> measured = BatchMeasured(margins, rule, target, batch_size=4, dataset_size=1000)
    >>> keep_batch_margin(measured, {})[0].new        # the limit at 16 is 8.06
    16
    """
    margins, present, target = measured.margins, measured.batch_size, measured.target
    if target.unit != "limit":
        raise ValueError(
            f"target {target}: keep_batch_margin needs TargetRegion.within_limits(share)"
        )
    _, share = target.bounds("non_uniformity")
    state = at_step(state, margins.step, "until")
    reason = _unusable(margins)
    if reason is not None:
        return measured.decide("hold", present, reason), state
    assert margins.non_uniformity is not None
    s, tolerance = margins.non_uniformity, band
    waiting = margins.step < state.get("until", -math.inf)
    if not waiting:
        s, tolerance, state = _averaged(s, state, band)
    ratio = ratio_to_limit(s, measured.limit(present))
    why = f"the non-uniformity is {ratio:.2f} of its limit, and should be at most {share:g}"
    within = ratio <= share * (1 + tolerance)
    if within or waiting:
        return measured.decide("keep" if within else "hold", present, why), state
    size = _smallest_size(measured, s / share)
    changed: State = {**without(state, "mean", "count"), "until": margins.step + dwell}
    return measured.decide("raise", max(size, present), why), changed


def _averaged(value: float, state: State, band: float) -> tuple[float, float, State]:
    """Return the average of the measurements up to ``value``, its tolerance and the new state.

    The error of one measurement may be 10 %, that of an average of k measurements 10 % / sqrt(k).
    """
    count = min(state.get("count", 0) + 1, AVERAGED)
    mean = state.get("mean", value)
    mean += (value - mean) / count
    tolerance = band * max(1.0, 4 / math.sqrt(count))
    return mean, tolerance, {**state, "mean": mean, "count": count}


def _smallest_size(measured: BatchMeasured, limit: float) -> int:
    """Return the smallest batch size whose limit on the non-uniformity is at least ``limit``."""
    allowed = TargetRegion(non_uniformity=(limit, None))
    return allowed.batch_size_for(measured.rule, measured.dataset_size)


def _unusable(margins: StabilityMargins) -> str | None:
    """Return why no law for the batch size can use the measurement, or ``None``."""
    why = why_unusable(margins, "non-uniformity", margins.non_uniformity)
    return why if why or margins.converged else UNCONVERGED
