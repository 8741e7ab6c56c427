"""`Schedule`: decides after which steps to measure, and accounts for the time that it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stableopt._support.arguments import positive, whole
from stableopt.distributed.collectives import Ranks

__all__ = ["Schedule", "moved"]

DEFAULT_OVERHEAD = 0.05

_FREE = 1.0
"""Seconds that the first measurement may take without waiting: a run is longer than that."""


class Schedule:
    """Measures every so many steps, or as often as a share of the training time allows.

    Args:
        every: measure after each so many steps.
        max_overhead: or: the largest share of the training time spent measuring; 0.05 by default.
        first: returns the seconds that the first measurement is expected to take. With ``max_overhead``
            it waits until the training time has paid for them, unless they are less than one.

    Attributes:
        pending: whether a measurement is due that waits for a step that moves something.

    Raises:
        ValueError: for numbers out of range, or both.

    >>> schedule = Schedule(every=2)
    >>> [schedule.turn(step, lambda: step != 2, Ranks()) for step in range(1, 6)]
    [False, False, True, True, False]
    """

    def __init__(
        self,
        every: int | None = None,
        max_overhead: float | None = None,
        first: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if every is not None and max_overhead is not None:
            raise ValueError("every and max_overhead: expected at most one of them")
        self._every = None if every is None else whole("every", every)
        share = DEFAULT_OVERHEAD if max_overhead is None else max_overhead
        self._max_overhead = positive("max_overhead", share)
        self.restore(pending=False)
        self._seconds, self._last_seconds, self._last_step = 0.0, 0.0, 0
        if self._every is None and (expected := first()) > _FREE:
            # As if there had been one like it, which the training has yet to pay for.
            self._last_seconds = expected
        self._began = self._last_end = time.perf_counter()

    def restore(self, *, pending: bool) -> None:
        """Continue from an earlier run, which left a measurement pending or not."""
        self.pending, self._next_question = pending, 0

    @property
    def each_step(self) -> bool:
        """Whether every step is measured."""
        return self._every == 1

    @property
    def overhead(self) -> float:
        """Time spent measuring, as a share of the time spent training."""
        training = time.perf_counter() - self._began - self._seconds
        return self._seconds / training if training > 0 else math.inf

    @contextmanager
    def timed(self, step: int) -> Iterator[None]:
        """Take the time of the block as that of a measurement after ``step``, failed ones too."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._last_end = time.perf_counter()
            self._last_seconds, self._last_step = self._last_end - began, step
            self._seconds += self._last_seconds

    def expects(self, step: int, ranks: Ranks) -> bool:
        """Whether :meth:`turn` may be true after ``step``, the next one; the same on all ranks.

        >>> schedule = Schedule(every=2)
        >>> [schedule.expects(step, Ranks()) for step in (1, 2, 3)]
        [False, True, False]
        """
        if ranks.several:
            return step >= self._next_question
        return self.pending or self._due(step)

    def turn(self, step: int, moved: Callable[[], bool], ranks: Ranks) -> bool:
        """Whether to measure after ``step``, which ``moved`` something; rank 0 decides for all.

        What is due after a step that moved nothing waits for the next that does.
        """
        if ranks.several and step < self._next_question:
            return False
        self.pending = self.pending or self._due(step)
        turn = self.pending and moved()
        self.pending = self.pending and not turn
        if ranks.several:
            found = turn, self.pending, step + self._steps_to_go(step)
            turn, self.pending, self._next_question = ranks.broadcast_object(found)
        return turn

    def _due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        # The training time since the last measurement has paid for one like it.
        waited = time.perf_counter() - self._last_end
        return waited >= self._last_seconds / self._max_overhead

    def _steps_to_go(self, step: int) -> int:
        """Return after how many steps to ask rank 0 again: to ask at each costs a broadcast a step."""
        if self.pending:
            return 1
        if self._every is not None:
            return self._every - step % self._every
        waited = time.perf_counter() - self._last_end
        each = waited / max(step - self._last_step, 1)
        left = self._last_seconds / self._max_overhead - waited
        # Half of what seems to be left, since steps differ: after a few questions, none is.
        return max(1, int(left / each / 2))


def moved(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the last step moved anything: not at rate zero, nor skipped by a grad scaler."""
    # Some optimizers choose their rate themselves, and have None.
    rates = [group.get("lr") for group in optimizer.param_groups]
    if all(rate is not None and float(rate) == 0 for rate in rates):
        return False
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or not bool(torch.as_tensor(found_inf).any())
