"""`JointStep`: the beginning and end of a step that several optimizers take together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch

__all__ = ["JointStep", "nested", "running_steps"]

_STEP_WRAPPER_FILE = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


class JointStep:
    """Tracks the joint steps of optimizers that share a model: one is complete when each has stepped.

    If an optimizer steps again before the others, as after a step that a gradient scaler skipped, it
    begins a new joint step.

    Args:
        optimizers: the optimizers.

    >>> first, second = (torch.optim.SGD([torch.zeros(1)]) for _ in range(2))
    >>> step = JointStep([first, second])
    >>> [(step.begins(o), step.ends(o)) for o in (first, first, second)]
    [(True, False), (True, False), (False, True)]
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._all = {id(optimizer) for optimizer in optimizers}
        self._stepped: set[int] = set()

    def begins(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the next step of ``optimizer`` begins a joint step."""
        if id(optimizer) in self._stepped:
            self._stepped.clear()
        return not self._stepped

    def ends(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the last step of ``optimizer`` completes the joint step."""
        self._stepped.add(id(optimizer))
        if self._stepped != self._all:
            return False
        self._stepped.clear()
        return True


def nested(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a hook of ``optimizer`` runs inside another ``step`` of the same optimizer.

    If a class's ``step`` calls the ``step`` of its parent, torch runs the hooks for both.
    """
    return running_steps(optimizer) > 1


def running_steps(optimizer: torch.optim.Optimizer) -> int:
    """Count the calls of ``optimizer.step`` on the stack; it is right also after a step that raised."""
    frame: FrameType | None = sys._getframe(1)
    steps = 0
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _STEP_WRAPPER_FILE:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps
