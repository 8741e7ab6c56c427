"""`costs` and `estimate`: roughly how long jobs will take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.runner.job import Job
from benchmarks.runner.store import Store

__all__ = ["costs", "estimate", "readable"]

OVERHEAD = 2.0
"""Roughly how much slower training is than a product of two large matrices."""


def estimate(jobs: Sequence[Job], store: Store, workers: int, device: str = "cpu") -> float:
    """Return roughly how many seconds ``jobs`` will take: an order of magnitude."""
    known = costs(jobs, store, device)
    return sum(known[job.id] for job in jobs if not store.done(job)) / workers


def costs(jobs: Sequence[Job], store: Store, device: str = "cpu") -> dict[str, float]:
    """Return roughly how many seconds each job takes one worker, by id.

    Known for jobs that are done; for others, from their operations and the speed of done jobs of the
    same kind, or else of a product of two matrices. A job that states no operations takes no time.
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


def _seconds_per_flop(device: str) -> float:
    a = torch.ones(512, 512, device=device)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - began)
    return min(times) / (2 * 512**3)


def readable(seconds: float) -> str:
    """Return a time in words.

    >>> readable(20), readable(400), readable(9000)
    ('under a minute', '7 minutes', '2.5 hours')
    """
    if seconds < 60:
        return "under a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
