"""`JointStep`: when several optimizers have taken one step together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

import torch

__all__ = ["JointStep", "nested", "running_steps"]

_OF_STEPS = torch.optim.Optimizer.profile_hook_step.__code__.co_filename


class JointStep:
    """Follows the steps of optimizers that share a model: a step is complete when each has stepped.

    An optimizer that steps again before the others have, as after a step that a gradient scaler
    skipped, begins a new joint step.

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
        """Whether the joint step begins with the step that ``optimizer`` is about to take."""
        if id(optimizer) in self._stepped:
            self._stepped.clear()
        return not self._stepped

    def ends(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the joint step ends with the step that ``optimizer`` has taken."""
        self._stepped.add(id(optimizer))
        if self._stepped != self._all:
            return False
        self._stepped.clear()
        return True


def nested(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a hook of ``optimizer`` runs inside another ``step`` of the same optimizer.

    A class whose ``step`` calls that of its parent has two of them, and torch calls the hooks for each.
    """
    return running_steps(optimizer) > 1


def running_steps(optimizer: torch.optim.Optimizer) -> int:
    """Count the calls of ``optimizer.step`` that have not returned, from the stack.

    The stack is right even after a step that raised.
    """
    frame: FrameType | None = sys._getframe(1)
    steps = 0
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OF_STEPS:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps
