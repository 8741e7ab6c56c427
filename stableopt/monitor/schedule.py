"""`Schedule`: decides after which steps to measure, and records the time spent measuring."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stableopt._support.arguments import positive, whole
from stableopt._support.tensors import as_tensor
from stableopt.distributed.collectives import Ranks

__all__ = ["Schedule", "step_moved"]

DEFAULT_OVERHEAD = 0.05
"""Share of the training time for measurements, if neither ``every`` nor ``max_overhead`` is given."""

_FREE = 1.0
"""Seconds that the first measurement may take without waiting: short compared with any run."""


class Schedule:
    """Selects every k-th step, or as many steps as a share of the training time allows.

    Args:
        every: the number k of steps between measurements.
        max_overhead: instead of ``every``, the largest share of the training time spent measuring; 0.05
            by default.
        first_seconds: returns the expected seconds of the first measurement. With ``max_overhead``, a
            first measurement that takes more than one waits until the training time allows it.

    Attributes:
        pending: whether a measurement is due, and waits for a step that changes the parameters.

    Raises:
        ValueError: for numbers out of range, or if both are given.

    >>> schedule = Schedule(every=2)
    >>> [schedule.should_measure(step, lambda: step != 2, Ranks()) for step in range(1, 6)]
    [False, False, True, True, False]
    """

    def __init__(
        self,
        every: int | None = None,
        max_overhead: float | None = None,
        first_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if every is not None and max_overhead is not None:
            raise ValueError("every and max_overhead: expected at most one of them")
        self._every = None if every is None else whole("every", every)
        share = DEFAULT_OVERHEAD if max_overhead is None else max_overhead
        self._max_overhead = positive("max_overhead", share)
        self._seconds, self._last_seconds = 0.0, 0.0
        if self._every is None:
            expected = first_seconds()
            # Counted as if it had just been taken: the training time must now pay for it.
            self._last_seconds = expected if expected > _FREE else 0.0
        self.restore(pending=False)
        self._began = self._last_end

    def restore(self, *, pending: bool) -> None:
        """Continue a resumed run, in which a measurement was ``pending`` or not."""
        self.pending, self._next_broadcast = pending, 0
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Count time and steps from now: the training time pays for the last measurement."""
        # Steps are counted here, since the monitor's count may include those of an earlier process.
        self._last_end, self._steps_since = time.perf_counter(), 0

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
    def timed(self) -> Iterator[None]:
        """Record the wall time of the block as a measurement, also if it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._start_waiting()
            self._last_seconds = self._last_end - began
            self._seconds += self._last_seconds

    def may_measure(self, step: int, ranks: Ranks) -> bool:
        """Whether :meth:`should_measure` can be true after the next step; the same on all ranks.

        >>> schedule = Schedule(every=2)
        >>> [schedule.may_measure(step, Ranks()) for step in (1, 2, 3)]
        [False, True, False]
        """
        if ranks.several:
            return step >= self._next_broadcast
        return self.pending or self._due(step)

    def should_measure(self, step: int, moved: Callable[[], bool], ranks: Ranks) -> bool:
        """Whether to measure after ``step``; rank 0 decides for all.

        ``moved`` returns whether the step changed the parameters. If it did not, a measurement that is
        due waits for the next step that does. Call this once after each step.
        """
        self._steps_since += 1
        if ranks.several and step < self._next_broadcast:
            return False
        self.pending = self.pending or self._due(step)
        measure_now = self.pending and moved()
        self.pending = self.pending and not measure_now
        if ranks.several:
            decision = measure_now, self.pending, step + self._steps_to_next_broadcast(step)
            measure_now, self.pending, self._next_broadcast = ranks.broadcast_object(decision)
        return measure_now

    def _due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        # Due once the training time since the last measurement allows another of the same length.
        waited = time.perf_counter() - self._last_end
        return waited >= self._last_seconds / self._max_overhead

    def _steps_to_next_broadcast(self, step: int) -> int:
        """Return the number of steps until rank 0 broadcasts again, which saves a broadcast a step."""
        if self.pending:
            return 1
        if self._every is not None:
            return self._every - step % self._every
        waited = time.perf_counter() - self._last_end
        step_seconds = waited / self._steps_since
        remaining = self._last_seconds / self._max_overhead - waited
        # Half the estimate, since steps differ in length: a few broadcasts lead to the due step.
        return max(1, int(remaining / step_seconds / 2))


def step_moved(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the last step can have moved parameters.

    It cannot at learning rate zero, nor if a gradient scaler skipped it.
    """
    # Optimizers that choose their own learning rate have None.
    rates = [group.get("lr") for group in optimizer.param_groups]
    if all(rate is not None and float(rate) == 0 for rate in rates):
        return False
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is None or not bool(as_tensor(found_inf).any())
