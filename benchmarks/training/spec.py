"""`Spec`: what to train and when to stop, and the bookkeeping that all ways of training share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import nn

from benchmarks.runner import Work

__all__ = ["LOST", "Spec", "lost_runs", "outcome", "report", "worth_a_line"]


LOST = ("diverged", "collapsed")
"""Outcomes of runs that have no minimum to measure."""


class Spec(Protocol):
    """What the steps of a training run need to know about it."""

    lr: float
    seed: int
    batch_size: int | None
    target_loss: float
    max_steps: int

    def model(self, device: str = "cpu") -> nn.Module:
        """Return the network before its first step."""


def outcome(
    spec: Spec, steps: int, loss: float, *, epochs: int, dead: Callable[[], bool]
) -> str | None:
    """Return how training ends at this loss, or ``None`` if it continues.

    Args:
        spec: the target, and the most steps.
        steps: that were taken.
        loss: the training loss after them.
        epochs: that were taken.
        dead: whether all samples have the same outputs. It is asked now and then, and not before the
            first step, since a last layer may start at zero.
    """
    if not loss < math.inf:
        return "diverged"
    if loss <= spec.target_loss:
        return "reached"
    if steps >= spec.max_steps:
        return "out of steps"
    return "collapsed" if steps and worth_a_line(epochs) and dead() else None


def lost_runs(outcomes: Iterable[str]) -> list[str]:
    """Return in words how many runs have no minimum.

    >>> lost_runs(["reached", "diverged", "diverged"])
    ['2 diverged']
    """
    counts = Counter(outcomes)
    return [f"{counts[lost]} {lost}" for lost in LOST if counts[lost]]


def report(spec: Spec, work: Work, steps: int, loss: float, first: float) -> None:
    """Report progress by the logarithm of the loss, which falls about as a power of time."""
    work.progress(
        math.log(first / loss) / math.log(first / spec.target_loss),
        f"η = {spec.lr:g}, step {steps:,}, loss {loss:.1e}",
    )


def worth_a_line(epochs: int) -> bool:
    """Say whether the trace records this epoch: powers of two and multiples of 100."""
    return epochs & (epochs - 1) == 0 or epochs % 100 == 0
