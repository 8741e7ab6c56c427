"""About how long jobs will take, before they are begun."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.runner.job import Job
from benchmarks.runner.store import Store

__all__ = ["estimate", "readable"]

OVERHEAD = 2.0
"""How much slower training is than a product of two large matrices, roughly: to begin with."""


def estimate(jobs: Sequence[Job], store: Store, workers: int, device: str = "cpu") -> float:
    """Return about how many seconds ``jobs`` will take: an order of magnitude.

    From what jobs of the same kind took before, for the operations that they state; where there are
    none, from the speed of a product of two matrices.
    """
    rates: dict[str, list[float]] = {}
    seconds = 0.0
    for job in jobs:
        if store.done(job) and job.flops:
            rates.setdefault(job.kind, []).append(store.about(job)["seconds"] / job.flops)
    left = [job for job in jobs if not store.done(job)]
    machine = _seconds_per_flop(device) * OVERHEAD if any(job.flops for job in left) else 0.0
    for job in left:
        known = sorted(rates.get(job.kind, [machine]))
        seconds += job.flops * known[len(known) // 2]
    return seconds / workers


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
