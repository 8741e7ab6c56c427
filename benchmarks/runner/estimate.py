"""`costs` and `estimate`: estimated run times of jobs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from benchmarks.runner.job import Job
from benchmarks.runner.store import Store

__all__ = ["costs", "estimate", "readable"]

OVERHEAD = 2.0
"""Time of a training FLOP relative to one of a large matrix product, roughly."""


def estimate(jobs: Sequence[Job], store: Store, workers: int, device: str = "cpu") -> float:
    """Return the estimated seconds for the unfinished ones of ``jobs``, to an order of magnitude."""
    seconds = costs(jobs, store, device)
    return sum(seconds[job.id] for job in jobs if not store.done(job)) / workers


def costs(jobs: Sequence[Job], store: Store, device: str = "cpu") -> dict[str, float]:
    """Return the seconds of one worker for each job, by id.

    They are measured for finished jobs. For others, they are FLOPs times the seconds per FLOP of
    finished jobs of the same kind, or else of a matrix product. A job without FLOPs counts as zero.
    """
    seconds: dict[str, float] = {}
    rates: dict[str, list[float]] = {}
    for job in jobs:
        if store.done(job):
            seconds[job.id] = store.about(job)["seconds"]
            if job.flops:
                rates.setdefault(job.kind, []).append(seconds[job.id] / job.flops)
    remaining = [job for job in jobs if job.id not in seconds]
    machine_rate = (
        _seconds_per_flop(device) * OVERHEAD if any(job.flops for job in remaining) else 0.0
    )
    for job in remaining:
        seconds[job.id] = job.flops * median(rates.get(job.kind, [machine_rate]))
    return seconds


def _seconds_per_flop(device: str) -> float:
    a = torch.ones(512, 512, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        times.append(time.perf_counter() - start)
    return min(times) / (2 * 512**3)


def readable(seconds: float) -> str:
    """Return a duration in words.

    >>> readable(20), readable(400), readable(9000)
    ('under a minute', '7 minutes', '2.5 hours')
    """
    if seconds < 60:
        return "under a minute"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
