"""`fastest_method`: the fastest method for products with per-sample Hessians, by timing samples."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from stableopt.curvature.per_sample.generic import loop_product, samples_at_once, vmap_product
from stableopt.curvature.per_sample.structured import StructuredProduct
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.memo import Memo
from stableopt.curvature.problem.over_chunks import drawn_samples
from stableopt.curvature.products.hessian import Hessian

__all__ = ["WORTH_VMAP", "fastest_method", "may_be_slow"]

WORTH_VMAP = 16
"""Samples at once from which vmap is assumed faster than a loop, where the two are not timed."""

_LARGE = 2**16
"""Parameters from which methods are timed: the products of smaller models take milliseconds."""

_COPIED = 1 / 8
"""Share of parameters copied for each sample from which the structured method may not be the fastest."""

_SAMPLES = 16
"""Samples for timing: with more, the time per sample hardly falls."""

_SECONDS: Memo[dict[str, float]] = Memo()


def may_be_slow(structured: StructuredProduct) -> bool:
    """Return whether another method may be faster than the structured one.

    Like vmap, the structured method copies some parameters for each sample.
    """
    size = structured.shape[0]
    return size >= _LARGE and structured.copied >= _COPIED * size


def fastest_method(mean: Hessian, memory: int, structured: StructuredProduct | None) -> str:
    """Return ``"structured"``, ``"vmap"`` or ``"loop"``.

    Args:
        mean: the mean Hessian.
        memory: bytes of a vmapped chunk.
        structured: the structured product; ``None`` if it does not apply.
    """
    problem = mean.problem
    at_once = samples_at_once(problem, memory)
    if structured is None and (problem.num_params < _LARGE or at_once < 2):
        return "vmap" if at_once >= WORTH_VMAP else "loop"
    key = f"{structured is not None} {at_once}"
    seconds = _SECONDS.of(problem)
    if key not in seconds:
        local = _seconds(mean, at_once, structured)
        of_ranks = problem.ranks.all_gather_object(local)
        seconds[key] = {method: sum(of_rank[method] for of_rank in of_ranks) for method in local}
    times = seconds[key]
    return min(times, key=lambda method: times[method])


def _seconds(mean: Hessian, at_once: int, structured: StructuredProduct | None) -> dict[str, float]:
    """Return the seconds per sample of each method; infinity for a method that fails."""
    problem = mean.problem
    vector = problem.flatten([torch.ones_like(part) for part in mean.theta])
    zero = torch.zeros_like(vector)

    def seconds_per_sample(product: Callable[[], Tensor], count: int) -> float:
        times = []
        for _ in range(2):  # the first call includes set-up
            start = time.perf_counter()
            float(product()[0])  # waits for the device
            times.append(time.perf_counter() - start)
        return min(times) / count

    with problem.evaluation():
        drawn = drawn_samples(problem)
        sample = cut(drawn.batch, 0, 1)
        times = {"loop": seconds_per_sample(lambda: loop_product(mean, sample, 1, vector, zero), 1)}
        count = min(drawn.size, _SAMPLES)
        if structured is not None:
            product = structured.cached_product(cut(drawn.batch, 0, count), count, vector)
            times["structured"] = seconds_per_sample(product, count)
        times["vmap"] = float("inf")
        count = min(count, at_once)
        if count > 1:
            samples = cut(drawn.batch, 0, count)
            try:
                times["vmap"] = seconds_per_sample(
                    lambda: vmap_product(mean, samples, count, vector, zero), count
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # vmap does not support the model
                pass
    return times
