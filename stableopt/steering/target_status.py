"""`target_status`: whether the target is reached, missed or unreachable, by the measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stableopt.stability import StabilityMargins
from stableopt.steering.decision import Decision, Kind
from stableopt.steering.law_state import State
from stableopt.steering.lr_laws import TRIES
from stableopt.steering.target import OPEN, TargetRegion, bounded_values

__all__ = ["Situation", "target_status"]


@dataclass(frozen=True)
class Situation:
    """The input of :func:`target_status`.

    Attributes:
        margins: the fresh measurement.
        target: the region, absolute.
        lr: the learning rate.
        target_lr: the learning rate that the target asks for, or ``None``.
        max_lr: the largest allowed learning rate.
        batch_size: the batch size over all ranks, or ``None`` if nothing changes it.
        smallest: the smallest allowed batch size, likewise.
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


_FLOOR = "the network may have no minimum this flat: an output bias alone has curvature"
"""Why a small sharpness may be unreachable."""


def target_status(
    situation: Situation, state: State, *, band: float, patience: int
) -> tuple[Decision | None, State]:
    """Return a decision if the target is newly reached, missed again or unreachable; else ``None``.

    It is unreachable if its learning rate is above ``max_lr``, or was cut three times; or if the
    law no longer moves the rate, and the logarithmic distance to the target did not fall by a tenth
    within ``patience`` measurements.

    >>> margins = StabilityMargins(step=9, sharpness=4.1)
    >>> situation = Situation(margins, TargetRegion(sharpness=(0, 4.0)), lr=0.5, target_lr=0.5)
    >>> target_status(situation, {}, band=0.1, patience=20)[0].kind
    'reached'
    """
    margins, target = situation.margins, situation.target
    known = all(
        value is not None or target.bounds(name) == OPEN
        for name, value in bounded_values(margins).items()
    )
    if margins.failure is not None or not margins.converged or not known:
        return None, state
    # Training hovers around the edge, so a reached target is missed only beyond twice the band.
    misses = _misses(margins, target, 2 * band if state.get("reached") else band)
    if not misses:
        state = {**state, "since": 0.0, "best": math.inf}
        if state.get("reached"):
            return None, state
        state = {**state, "reached": 1.0}
        bounded = next(name for name in bounded_values(margins) if target.bounds(name) != OPEN)
        return _decision(situation, "reached", f"within the target: {target}", bounded), state
    miss = max(misses)
    distance, name, text = miss.distance, miss.name, miss.text
    if state.get("reached"):
        state = {**state, "reached": 0.0, "since": 0.0, "best": distance}
        return _decision(situation, "missed", f"{text} again", name), state
    why = _why_forbidden(situation, miss)
    if why is not None:
        return _decision(situation, "unreachable", why, name), state
    if distance < 0.9 * state.get("best", math.inf) or _rate_moves(situation):
        return None, {**state, "since": 0.0, "best": distance}
    since = state.get("since", 0.0) + 1  # measurements without progress
    if since < patience:
        return None, {**state, "since": since}
    why = _why_stuck(situation, miss)
    return _decision(situation, "unreachable", why, name), {**state, "since": 0.0}


class _Miss(NamedTuple):
    """A missed bound: the logarithmic distance to it, the quantity, its side, and all in words."""

    distance: float
    name: str
    side: Literal["above", "below"]
    text: str


def _misses(margins: StabilityMargins, target: TargetRegion, band: float) -> list[_Miss]:
    """Return each bound missed by more than ``band``."""
    misses = []
    for name, value in bounded_values(margins).items():
        low, high = target.bounds(name)
        if value is None or not value > 0:
            continue
        title = name.replace("_", "-")
        if value > high * (1 + band):
            text = f"{title} {value:.3g} is above {high:.3g}"
            misses.append(_Miss(math.log(value / high), name, "above", text))
        elif value < low * (1 - band):
            text = f"{title} {value:.3g} is below {low:.3g}"
            misses.append(_Miss(math.log(low / value), name, "below", text))
    return misses


def _rate_moves(situation: Situation) -> bool:
    """Return whether the law still moves the rate towards the target's.

    It lowers the rate only for a target with a lower bound on the sharpness.
    """
    target_lr, lr = situation.target_lr, situation.lr
    if target_lr is None or math.isclose(lr, target_lr, rel_tol=1e-6):
        return False
    rises = lr < min(target_lr, situation.max_lr)
    falls = lr > target_lr and situation.target.bounds("sharpness")[0] != 0
    return rises or falls


def _why_forbidden(situation: Situation, miss: _Miss) -> str | None:
    """Return why the target's rate cannot be set, or ``None``."""
    target_lr, is_sharpness = situation.target_lr, miss.name == "sharpness"
    if situation.cuts >= TRIES:
        floor = f": {_FLOOR}" if is_sharpness else ""
        return f"{miss.text}, and the rate had to be cut {situation.cuts} times on the way{floor}"
    if is_sharpness and target_lr is not None and target_lr > situation.max_lr:
        if situation.lr < situation.max_lr:
            return None  # the rate still rises, and the target may be reached below max_lr
        return f"{miss.text}, which takes a rate of {target_lr:.3g}, above max_lr={situation.max_lr:.3g}"
    return None


def _why_stuck(situation: Situation, miss: _Miss) -> str:
    """Return why the target is not approached although the learning rate no longer moves."""
    low, loss = situation.target.bounds("sharpness")[0], situation.margins.loss
    if (miss.name, miss.side) == ("sharpness", "below"):
        remaining = "" if loss is None else f" {loss:.2g}"
        return (
            f"target sharpness {low:.4g} is above what the loss left to descend{remaining} can produce:"
            f" {miss.text}"
        )
    if miss.name == "non_uniformity" and situation.batch_size == situation.smallest:
        return f"{miss.text}, and no smaller batch than {situation.smallest} is allowed"
    return f"{miss.text}, and has hardly come closer"


def _decision(situation: Situation, kind: Kind, why: str, name: str) -> Decision:
    """Return a decision about the target, with the quantity ``name`` as its value."""
    margins = situation.margins
    measured = bounded_values(margins)[name]
    value = math.nan if measured is None else measured
    return Decision("target", kind, value, value, why, measured, None, margins.step)
