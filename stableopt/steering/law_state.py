"""`State`: what a control law remembers from one measurement to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

__all__ = ["State", "at_step", "new_state", "without"]

State: TypeAlias = Mapping[str, float]
"""The memory of a law: plain numbers by name, which a checkpoint can hold."""


def new_state() -> State:
    """Return the state of a law before its first call."""
    return {}


def without(state: State, *names: str) -> State:
    """Return the state without these entries."""
    return {name: value for name, value in state.items() if name not in names}


def at_step(state: State, step: int, *names: str) -> State:
    """Return the state with this ``"step"``.

    If the counter of steps went back, as it does when it was not restored with a checkpoint, the
    entries ``names``, which are steps, are dropped.

    >>> at_step({"step": 900, "until": 1000, "mean": 2.0}, 10, "until")
    {'mean': 2.0, 'step': 10}
    """
    if step < state.get("step", -math.inf):
        state = without(state, "step", *names)
    return {**state, "step": step}
