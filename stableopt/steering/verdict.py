"""`verdict`: whether the target is reached, missed or unreachable, from measurements alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stableopt.stability import StabilityMargins
from stableopt.steering.decision import Decision, Kind
from stableopt.steering.lr_laws import TRIES, State
from stableopt.steering.target import OPEN, TargetRegion, bounded_values

__all__ = ["Situation", "verdict"]


@dataclass(frozen=True)
class Situation:
    """The input of a verdict.

    Attributes:
        margins: the fresh measurement.
        target: the region, absolute.
        lr: the learning rate.
        target_lr: the learning rate that the target asks for, or ``None``.
        max_lr: the largest allowed learning rate.
        batch_size: the batch size, or ``None`` if nothing changes it.
        smallest: the smallest allowed batch size.
        cuts: the number of cuts of the learning rate since the target was last reached.
    """

    margins: StabilityMargins
    target: TargetRegion
    lr: float
    target_lr: float | None = None
    max_lr: float = math.inf
    batch_size: int | None = None
    smallest: int = 1
    cuts: int = 0


_FLOOR = "a network has a least sharpness, of its output's bias if nothing else"


def verdict(
    situation: Situation, state: State, *, band: float = 0.1, patience: int = 20
) -> tuple[Decision | None, State]:
    """Return that the target is newly reached, missed again or unreachable; else ``None``.

    It is unreachable if the rate that it asks for is not allowed, or was cut three times; or if all
    knobs have the values that it asks for, and the logarithmic distance did not fall by a tenth
    within ``patience`` measurements.

    >>> margins = StabilityMargins(step=9, sharpness=4.1)
    >>> situation = Situation(margins, TargetRegion(sharpness=(0, 4.0)), lr=0.5, target_lr=0.5)
    >>> verdict(situation, {})[0].kind
    'reached'
    """
    margins, target = situation.margins, situation.target
    known = all(
        value is not None or target.bounds(name) == OPEN
        for name, value in bounded_values(margins).items()
    )
    if margins.failure is not None or not margins.converged or not known:
        return None, state
    # Training hovers about the edge, so a reached target is missed only at twice the band.
    misses = _misses(margins, target, 2 * band if state.get("reached") else band)
    if not misses:
        state = {**state, "since": 0.0, "best": math.inf}
        if state.get("reached"):
            return None, state
        return _say(situation, "reached", f"within the target: {target}"), {**state, "reached": 1.0}
    distance, what = max(misses)
    if state.get("reached"):
        missed = {**state, "reached": 0.0, "since": 0.0, "best": distance}
        return _say(situation, "missed", f"{what} again"), missed
    why = _forbidden(situation, what)
    if why is not None:
        return _say(situation, "unreachable", why), state
    nearer = distance < 0.9 * state.get("best", math.inf)
    at_work = _at_work(situation)
    if nearer or at_work:
        return None, {**state, "since": 0.0, "best": distance}
    since = state.get("since", 0.0) + 1
    state = {**state, "since": since}
    if since < patience:
        return None, state
    return _say(situation, "unreachable", _stuck(situation, what)), {**state, "since": 0.0}


def _misses(
    margins: StabilityMargins, target: TargetRegion, band: float
) -> list[tuple[float, str]]:
    """Return distance, logarithmic, and text for each bound missed by more than ``band``."""
    found = []
    for name, value in bounded_values(margins).items():
        low, high = target.bounds(name)
        if value is None or not value > 0:
            continue
        shown = name.replace("_", "-")
        if value > high * (1 + band):
            found.append((math.log(value / high), f"{shown} {value:.3g} is above {high:.3g}"))
        elif value < low * (1 - band):
            found.append((math.log(low / value), f"{shown} {value:.3g} is below {low:.3g}"))
    return found


def _at_work(situation: Situation) -> bool:
    """Return whether the rate still moves: up to the target's, or down to it, which sharpens."""
    wanted, lr = situation.target_lr, situation.lr
    if wanted is None or math.isclose(lr, wanted, rel_tol=1e-6):
        return False
    return lr < min(wanted, situation.max_lr) or (
        lr > wanted and situation.target.bounds("sharpness")[0] != 0
    )


def _forbidden(situation: Situation, what: str) -> str | None:
    wanted = situation.target_lr
    if situation.cuts >= TRIES:
        return f"{what}, and the rate had to be cut {situation.cuts} times on the way: {_FLOOR}"
    if what.startswith("sharpness") and wanted is not None and wanted > situation.max_lr:
        if situation.lr < situation.max_lr:
            return None  # the rate still rises, and may reach the target before
        return f"{what}, which takes a rate of {wanted:.3g}, above max_lr={situation.max_lr:.3g}"
    return None


def _stuck(situation: Situation, what: str) -> str:
    low, loss = situation.target.bounds("sharpness")[0], situation.margins.loss
    if what.startswith("sharpness") and "below" in what:
        left = "" if loss is None else f" {loss:.2g}"
        return (
            f"target sharpness {low:.4g} is above what the loss left to descend{left} can produce:"
            f" {what}"
        )
    if what.startswith("non-uniformity") and situation.batch_size == situation.smallest:
        return f"{what}, and no smaller batch than {situation.smallest} is allowed"
    return f"{what}, and hardly comes nearer"


def _say(situation: Situation, kind: Kind, why: str) -> Decision:
    margins = situation.margins
    a = margins.limited_sharpness
    value = margins.non_uniformity if a is None else a
    shown = math.nan if value is None else value
    return Decision("target", kind, shown, shown, why, value, None, margins.step)
