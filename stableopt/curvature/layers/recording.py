"""`recorded`: a recorder for one pass that knows the structure of torch's functions and of units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stableopt.curvature.layers.calls import CALLS
from stableopt.curvature.layers.plan import Plan
from stableopt.curvature.layers.recorder import Recorder
from stableopt.curvature.problem.problem import Theta

__all__ = ["recorded"]


@contextmanager
def recorded(plan: Plan, theta: Theta, size: int) -> Iterator[Recorder]:
    """Yield a recorder for a single pass at ``theta``: ``with recorder: loss(theta)``."""
    recorder = Recorder(plan, theta, size, CALLS)
    with ExitStack() as stack:
        for unit in plan.units:
            enter, leave = recorder.enter_unit, recorder.leave_unit
            stack.callback(unit.register_forward_pre_hook(enter).remove)
            stack.callback(unit.register_forward_hook(leave, with_kwargs=True).remove)
        yield recorder
