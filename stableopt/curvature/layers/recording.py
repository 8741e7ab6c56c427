"""`recorded`: a recorder for one pass that knows the structure of torch's functions and of units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

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
            before, after = _unit_hooks(recorder)
            stack.callback(unit.register_forward_pre_hook(before).remove)
            stack.callback(unit.register_forward_hook(after, with_kwargs=True).remove)
        yield recorder


def _unit_hooks(recorder: Recorder) -> tuple[Callable[..., Any], Callable[..., Any]]:
    inside = False

    def before(module: nn.Module, args: Any) -> None:
        if not inside:
            recorder.enter_unit(module, args)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            return recorder.leave_unit(module, args, kwargs, output)
        finally:
            inside = False

    return before, after
