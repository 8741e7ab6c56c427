"""About how long jobs will take, before they are begun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.runner.job import Job
from benchmarks.runner.store import Store

__all__ = ["costs", "estimate", "readable", "time_left"]

OVERHEAD = 2.0
"""How much slower training is than a product of two large matrices, roughly: to begin with."""


def estimate(jobs: Sequence[Job], store: Store, workers: int, device: str = "cpu") -> float:
    """Return about how many seconds ``jobs`` will take: an order of magnitude."""
    told = costs(jobs, store, device)
    return sum(told[job.id] for job in jobs if not store.done(job)) / workers


def costs(jobs: Sequence[Job], store: Store, device: str = "cpu") -> dict[str, float]:
    """Return about how many seconds each job takes one worker, by id.

    From what jobs of the same kind took before, for the operations that they state; where there are
    none, from the speed of a product of two matrices. A job that states none takes no time; what a
    job that is done took is known.
    """
    seconds: dict[str, float] = {}
    rates: dict[str, list[float]] = {}
    for job in jobs:
        if store.done(job):
            seconds[job.id] = store.about(job)["seconds"]
            if job.flops:
                rates.setdefault(job.kind, []).append(seconds[job.id] / job.flops)
    left = [job for job in jobs if job.id not in seconds]
    machine = _seconds_per_flop(device) * OVERHEAD if any(job.flops for job in left) else 0.0
    for job in left:
        seconds[job.id] = job.flops * median(rates.get(job.kind, [machine]))
    return seconds


def time_left(seconds: float, first: float, share: float) -> float | None:
    """Return the seconds that are left, if work goes on as it did; ``None`` if none was seen.

    Args:
        seconds: for which it has been going on.
        first: share that was done when it began.
        share: that is done now.

    >>> time_left(30, first=0.5, share=0.75)
    30.0
    """
    return seconds * (1 - share) / (share - first) if share > first else None


def _seconds_per_flop(device: str) -> float:
    a = torch.ones(512, 512, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - began)
    return min(times) / (2 * 512**3)


def readable(seconds: float) -> str:
    """Return a time as people say it.

    >>> readable(20), readable(400), readable(9000)
    ('under a minute', '7 minutes', '2.5 hours')
    """
    if seconds < 60:
        return "under a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
