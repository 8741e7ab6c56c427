r"""Control laws for the batch size: pure functions of a measurement and a state.

As those of :mod:`~stableopt.steering.lr_laws`, ``law(measured, state) -> (decision, state)``, once for each
fresh measurement. A smaller batch lowers the limit on the non-uniformity, for plain SGD
:math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, and so makes the less uniform minima unstable.

The limit is the side of the box (9), which in several dimensions is neither necessary nor sufficient.
It is therefore where the staircase goes first, and not where it must end: what counts is the
non-uniformity that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stableopt.stability import StabilityMargins, UpdateRule
from stableopt.steering.decision import Decision, Kind
from stableopt.steering.lr_laws import State
from stableopt.steering.target import TargetRegion

__all__ = ["BatchLaw", "BatchMeasured", "batch_staircase", "keep_batch_margin"]


@dataclass(frozen=True)
class BatchMeasured:
    """What a law for the batch size is told.

    Attributes:
        margins: the fresh measurement.
        rule: the update rule as it stands.
        target: the region, resolved.
        batch_size: samples in a step now, of all ranks together.
        dataset_size: samples n in all.
        smallest: the smallest batch size that is allowed.
        largest: the largest.
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
        """Return a decision for ``batch_size``, within what is allowed if it is a new one."""
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
) -> tuple[Decision, State]:
    r"""Go to the batch size whose limit is the target, and on for as long as s is not within it.

    - s above the target's upper bound: multiply B by ``factor``, down to
      :meth:`~TargetRegion.batch_size_for`; from there on by sqrt(``factor``) as long as s stays; but
      never to where s is more than ``gate`` times its limit: so much noise would scatter the weights
      and not only lead them away. Where that gate has held for ``patience`` steps, and the next
      size would still be within ``last_gate``, take that: below ten samples sizes lie far apart;
    - s below the lower bound by more than ``band``, so that the two do not meet: divide B by
      ``factor``;
    - in between: keep. After a change, wait ``dwell`` steps for its effect;
    - a loss that is not finite, or above the cap: divide B by ``factor``.

    >>> margins = StabilityMargins(step=10, non_uniformity=6.0)
    >>> target = TargetRegion(non_uniformity=(0, 4.0))
    >>> at = BatchMeasured(margins, UpdateRule(lr=0.5), target, batch_size=64, dataset_size=1000)
    >>> batch_staircase(at, {})[0].new
    32
    """
    margins, now = measured.margins, measured.batch_size
    step, s = margins.step, margins.non_uniformity
    waiting = step < state.get("until", -math.inf)
    settled: State = {k: v for k, v in state.items() if k != "held"} | {"until": step + dwell}
    lost = _lost(measured)
    if lost is not None and not waiting:
        return measured.decide("raise", math.ceil(now / factor), lost), settled
    wait = lost or _unusable(margins)
    if wait is not None:
        return measured.decide("hold", now, wait), state
    assert s is not None
    low, high = measured.target.non_uniformity
    assert low is not None
    assert high is not None
    if s > high:
        why = f"the non-uniformity {s:.3g} is above the target's {high:.3g}"
        if waiting:
            return measured.decide("hold", now, f"{why}; the last change is still at work"), state
        if now <= measured.smallest:
            return measured.decide("hold", now, f"{why}; there is no smaller batch"), state
        seed = measured.target.batch_size_for(measured.rule, measured.dataset_size)
        # Below the seed the box already forbids s: smaller steps, since it may just be slow.
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
    if s < low * (1 - band):
        why = f"the non-uniformity {s:.3g} is below the target's {low:.3g}"
        if waiting:
            return measured.decide("hold", now, f"{why}; the last change is still at work"), state
        return measured.decide("raise", math.ceil(now / factor), why), settled
    return measured.decide("keep", now, "the non-uniformity is within the target"), state


def keep_batch_margin(
    measured: BatchMeasured, state: State, *, dwell: int = 100
) -> tuple[Decision, State]:
    """Raise the batch size where the non-uniformity is above a share of its limit; never lower it.

    >>> margins = StabilityMargins(step=1, non_uniformity=4.0)
    >>> at = BatchMeasured(margins, UpdateRule(lr=0.5), TargetRegion.margin(0.5), 4, 1000)
    >>> keep_batch_margin(at, {})[0].new        # the limit at 16 is 8.06
    16
    """
    margins, now, share = measured.margins, measured.batch_size, measured.target.share
    if share is None:
        raise ValueError(f"target {measured.target}: keep_batch_margin needs a margin")
    wait = _unusable(margins)
    if wait is not None:
        return measured.decide("hold", now, wait), state
    s = margins.non_uniformity
    assert s is not None
    ratio = s / measured.limit(now)
    why = f"the non-uniformity is {ratio:.2f} of its limit, to be at most {share:g}"
    if ratio <= share or margins.step < state.get("until", -math.inf):
        return measured.decide("keep" if ratio <= share else "hold", now, why), state
    wanted = TargetRegion(non_uniformity=(s / share, None))
    size = wanted.batch_size_for(measured.rule, measured.dataset_size)
    return measured.decide("raise", max(size, now), why), {**state, "until": margins.step + dwell}


def _least(measured: BatchMeasured, limit: float) -> int:
    """Return the smallest batch size whose limit on the non-uniformity is at least ``limit``."""
    allowed = TargetRegion(non_uniformity=(limit, None))
    return allowed.batch_size_for(measured.rule, measured.dataset_size)


def _lost(measured: BatchMeasured) -> str | None:
    failure, loss = measured.margins.failure, measured.margins.loss
    if failure is not None and failure.startswith("not finite"):
        return failure
    if loss is not None and not loss <= measured.loss_cap:
        return f"the loss {loss:.3g} is above its cap {measured.loss_cap:.3g}"
    return None


def _unusable(margins: StabilityMargins) -> str | None:
    if margins.failure is not None:
        return f"the measurement failed: {margins.failure}"
    if margins.non_uniformity is None:
        return "the non-uniformity was not measured"
    return None if margins.converged else "the measurement did not converge"
