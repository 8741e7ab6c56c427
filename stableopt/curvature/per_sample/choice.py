"""`quickest_way`: the way of products with per-sample curvatures that takes the least time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from stableopt.curvature.per_sample.generic import loop_product, samples_at_once, vmap_product
from stableopt.curvature.per_sample.structured import StructuredProduct
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.mean_loss import Memo
from stableopt.curvature.problem.over_chunks import drawn_samples
from stableopt.curvature.products.hessian import Hessian

__all__ = ["WORTH_VMAP", "doubtful", "quickest_way"]

WORTH_VMAP = 16
"""Samples at once below which the overhead of vmap outweighs what it saves, where it is not timed."""

_LARGE = 2**16
"""Parameters from which the ways are timed: the products of smaller models take milliseconds."""

_COPIED = 1 / 8
"""Share of the parameters with copies for each sample from which the structure may not pay."""

_SAMPLES = 16
"""Samples that ways are timed on: with more, each takes hardly less."""

_SECONDS: Memo[dict[str, float]] = Memo()


def doubtful(structured: StructuredProduct) -> bool:
    """Return whether another way may be quicker than the structure.

    It multiplies with copies of some parameters for each sample, as vmap does with all.
    """
    size = structured.shape[0]
    return size >= _LARGE and structured.copied >= _COPIED * size


def quickest_way(of: Hessian, memory: int, structured: StructuredProduct | None) -> str:
    """Return ``"structured"``, ``"vmap"`` or ``"loop"``.

    Args:
        of: the mean Hessian.
        memory: bytes of a vmapped chunk.
        structured: the structure, if it holds.
    """
    problem = of.problem
    at_once = samples_at_once(problem, memory)
    if structured is None and (problem.num_params < _LARGE or at_once < 2):
        return "vmap" if at_once >= WORTH_VMAP else "loop"
    key = f"{structured is not None} {at_once}"
    seconds = _SECONDS.on(problem)
    if key not in seconds:
        own = _seconds(of, at_once, structured)
        everywhere = problem.ranks.all_gather_object(own)
        seconds[key] = {way: sum(of_rank[way] for of_rank in everywhere) for way in own}
    found = seconds[key]
    return min(found, key=lambda way: found[way])


def _seconds(of: Hessian, at_once: int, structured: StructuredProduct | None) -> dict[str, float]:
    """Return what each way takes for a sample; infinity for a way that fails."""
    problem = of.problem
    vector = problem.flatten([torch.ones_like(part) for part in of.theta])
    zero = torch.zeros_like(vector)

    def timed(product: Callable[[], Tensor], count: int) -> float:
        times = []
        for _ in range(2):  # the first call sets things up
            began = time.perf_counter()
            float(product()[0])  # until the device is done
            times.append(time.perf_counter() - began)
        return min(times) / count

    with problem.evaluation():
        batch, size, *_ = drawn_samples(problem)
        one, count = cut(batch, 0, 1), min(size, _SAMPLES)
        found = {"loop": timed(lambda: loop_product(of, one, 1, vector, zero), 1)}
        if structured is not None:
            part = cut(batch, 0, count)
            found["structured"] = timed(structured.once(part, count, vector), count)
        found["vmap"] = float("inf")
        count = min(count, at_once)
        if count > 1:
            part = cut(batch, 0, count)
            try:
                found["vmap"] = timed(lambda: vmap_product(of, part, count, vector, zero), count)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # vmap cannot follow the model
                pass
    return found
