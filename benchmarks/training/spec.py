"""`Spec`: what to train and when to stop; the stopping rule and progress that all runs share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn

from benchmarks.runner import Work

__all__ = ["LOST", "Spec", "is_traced", "lost_runs", "outcome", "report"]


LOST = ("diverged", "collapsed")
"""Outcomes without a minimum to measure."""


class Spec(Protocol):
    """The settings of a training run that its steps use."""

    lr: float
    seed: int
    batch_size: int | None
    target_loss: float
    max_steps: int

    def model(self, device: str = "cpu") -> nn.Module:
        """Return the initialised network."""


def outcome(
    spec: Spec, steps: int, loss: float, *, epochs: int, has_collapsed: Callable[[], bool]
) -> str | None:
    """Return the outcome of training if it ends here, or ``None`` if it continues.

    Args:
        spec: the target loss, and the largest number of steps.
        steps: number of steps taken.
        loss: the training loss after them.
        epochs: number of epochs taken.
        has_collapsed: returns whether the outputs are the same for all samples. It is called at
            traced epochs only, and not before the first step: a last layer may start at zero.
    """
    if not loss < math.inf:
        return "diverged"
    if loss <= spec.target_loss:
        return "reached"
    if steps >= spec.max_steps:
        return "out of steps"
    return "collapsed" if steps and is_traced(epochs) and has_collapsed() else None


def lost_runs(outcomes: Iterable[str]) -> list[str]:
    """Return the numbers of runs without a minimum, in words.

    >>> lost_runs(["reached", "diverged", "diverged"])
    ['2 diverged']
    """
    counts = Counter(outcomes)
    return [f"{counts[outcome]} {outcome}" for outcome in LOST if counts[outcome]]


def report(spec: Spec, work: Work, steps: int, loss: float, initial_loss: float) -> None:
    """Report progress on the scale of the log loss: the loss falls roughly as a power of time."""
    work.progress(
        math.log(initial_loss / loss) / math.log(initial_loss / spec.target_loss),
        f"η = {spec.lr:g}, step {steps:,}, loss {loss:.1e}",
    )


def is_traced(epochs: int) -> bool:
    """Return whether the trace records this epoch: powers of two and multiples of 100."""
    return epochs & (epochs - 1) == 0 or epochs % 100 == 0
