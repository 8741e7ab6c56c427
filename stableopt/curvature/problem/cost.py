r"""`expected_costs`: time and memory of a problem's quantities, estimated before they are computed.

One gradient is timed, on a few samples. The rest are counts: from a random start, Lanczos takes about
:math:`10 + 4\log_{10}(1/\mathrm{tol})` products. A product with the Hessian costs two gradients, or
three if the passes do not fit into the cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.autodiff import saved_bytes
from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.mean_loss import MeanLoss, Theta

__all__ = ["CACHE", "MOST_VECTORS", "Cost", "expected_costs", "expected_products", "vectors_held"]

CACHE = 2**30
"""Default limit, in bytes, of cached passes, and of Lanczos vectors."""

_TIMED_SAMPLES = 64

MOST_VECTORS, _FEWEST_VECTORS = 40, 6
"""Most and fewest vectors of the parameters' size in an eigen-solver: as many as fit into 1 GiB twice,
since a restart holds old and new vectors. With fewer than the most, none are kept as a warm start."""

_RESTARTS = 1.5
"""Factor on the products of a search that restarts with few vectors."""

_LINEARISED = 1.5
"""Cost of passes with an autograd graph, in gradients."""

_ALONG_STEP = {"realised_edge": (1, 4 / 3), "critical_sharpness": (8, 4.0)}
"""Number of losses along a step, and the cost of these losses and the gradient, in gradients."""


@dataclass(frozen=True)
class Cost:
    """Expected cost of a quantity, to about a factor of two.

    Attributes:
        products: products with the Hessian; for quantities along a step, losses.
        gradients: work, in gradients over all samples.
        seconds: time.
        bytes: peak memory, in addition to the model.
    """

    products: int
    gradients: float
    seconds: float
    bytes: int


def vectors_held(num_params: int, itemsize: int) -> int:
    """Return how many vectors of the parameters' size an eigen-solver may hold at once.

    >>> vectors_held(1000, 4), vectors_held(124_000_000, 4)
    (40, 6)
    """
    return max(_FEWEST_VECTORS, min(MOST_VECTORS, CACHE // (2 * num_params * itemsize)))


def expected_products(tol: float, *, restarts: bool = False) -> int:
    """Return the approximate number of products that a search from a random start takes.

    >>> expected_products(0.03), expected_products(1e-3), expected_products(1e-3, restarts=True)
    (17, 22, 33)
    """
    products = 10 - 4 * math.log10(min(tol, 1.0))
    return math.ceil(round(products, 6) * (_RESTARTS if restarts else 1))


def expected_costs(
    problem: MeanLoss, loss: Callable[[Theta, Any], Tensor], tol: float
) -> dict[str, Cost]:
    """Return the expected costs by the name of the quantity, and that of a ``"gradient"``.

    Args:
        problem: the problem.
        loss: the mean loss of a batch at given parameters.
        tol: the relative residual of a search.
    """
    seconds, sample_bytes = _timed_gradient(problem, loss)
    n, vector_bytes = problem.own_samples, problem.num_params * problem.dtype.itemsize
    vectors = vectors_held(problem.num_params, problem.dtype.itemsize)
    products = expected_products(tol, restarts=vectors < expected_products(tol))
    products = min(products, problem.num_params)
    pass_bytes = 2 * sample_bytes * n + vector_bytes
    cached = pass_bytes <= CACHE
    gradients = _LINEARISED + products * 2 if cached else products * 3
    graph_bytes = min(sample_bytes * n, CACHE)
    costs = {"gradient": Cost(0, 1.0, seconds, int(2 * vector_bytes + graph_bytes))}
    # The parameters, the basis, and three temporary vectors while a product is orthogonalised.
    search_bytes = vector_bytes * (1 + min(vectors, products) + 3) + min(pass_bytes, CACHE)
    for name in ("sharpness", "preconditioned_sharpness"):
        costs[name] = Cost(products, gradients, gradients * seconds, int(search_bytes))
    for name, (losses, work) in _ALONG_STEP.items():
        costs[name] = Cost(losses, work, work * seconds, int(5 * vector_bytes + graph_bytes))
    return costs


def _timed_gradient(problem: MeanLoss, loss: Callable[[Theta, Any], Tensor]) -> tuple[float, float]:
    """Return the seconds of a gradient over all samples, and autograd's saved bytes per sample."""
    with torch.inference_mode(False), problem.evaluation():
        batch, size = next(problem.chunks(_TIMED_SAMPLES))
        theta = problem.theta()

        def gradient_seconds() -> float:
            start = time.perf_counter()
            torch.autograd.grad(loss(theta, batch), theta, allow_unused=True)
            if problem.device.type == "cuda":
                torch.cuda.synchronize(problem.device)
            return time.perf_counter() - start

        try:
            one = saved_bytes(lambda: loss(theta, cut(batch, 0, 1)))
            two = saved_bytes(lambda: loss(theta, cut(batch, 0, 2)))
            sample_bytes = float(one if size == 1 else max(two - one, 1))
        except RuntimeError:  # torch.func within the model excludes saved tensor hooks
            sample_bytes = 0.0
        seconds = gradient_seconds()
        if seconds < 1.0:  # a second run, cheap here, excludes one-time setup
            seconds = min(seconds, gradient_seconds())
    return seconds * problem.own_samples / size, sample_bytes
