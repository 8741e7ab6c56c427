r"""`expected_costs`: what quantities of a problem will take, before they are paid.

One gradient is timed, on a few samples. The rest are counts: a search by Lanczos takes about
:math:`10 + 4\log_{10}(1/\mathrm{tol})` products from a random start, and a product with the Hessian two
gradients, or three where the passes do not fit into the cache.
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
"""Default bytes of passes, and of Lanczos vectors, that a search keeps."""

_TIMED_SAMPLES = 64

MOST_VECTORS, _FEWEST_VECTORS = 40, 6
"""Most and fewest vectors of the parameters' size in an eigen-solver: as many as fit into 1 GiB twice,
since a restart holds old and new ones. With fewer than the most, none are kept as a warm start."""

_RESTARTS = 1.5
"""Factor on the products of a search that restarts with few vectors."""

_LINEARISED = 1.5
"""Gradients that passes with a graph cost."""

_ALONG_STEP = {"realised_edge": (1, 4 / 3), "critical_sharpness": (8, 4.0)}
"""Losses along a step, and what these and the gradient cost in gradients."""


@dataclass(frozen=True)
class Cost:
    """What a quantity is expected to take, to about a factor of two.

    Attributes:
        products: products with the Hessian; for quantities along a step, losses.
        gradients: its work in gradients over all samples.
        seconds: its time.
        bytes: its largest memory, in addition to the model.
    """

    products: int
    gradients: float
    seconds: float
    bytes: int


def vectors_held(num_params: int, itemsize: int) -> int:
    """Return the number of vectors of the parameters' size that a search may hold at once.

    >>> vectors_held(1000, 4), vectors_held(124_000_000, 4)
    (40, 6)
    """
    return max(_FEWEST_VECTORS, min(MOST_VECTORS, CACHE // (2 * num_params * itemsize)))


def expected_products(tol: float, *, restarts: bool = False) -> int:
    """Return about how many products a search from a random start takes.

    >>> expected_products(0.03), expected_products(1e-3), expected_products(1e-3, restarts=True)
    (17, 22, 33)
    """
    products = 10 - 4 * math.log10(min(tol, 1.0))
    return math.ceil(round(products, 6) * (_RESTARTS if restarts else 1))


def expected_costs(
    problem: MeanLoss, loss: Callable[[Theta, Any], Tensor], tol: float
) -> dict[str, Cost]:
    """Return the costs of the quantities, by name, and of a ``"gradient"``.

    Args:
        problem: the problem.
        loss: its mean loss of a batch at given parameters.
        tol: the relative residual of a search.
    """
    seconds, each = _timed_gradient(problem, loss)
    n, own = problem.own_samples, problem.num_params * problem.dtype.itemsize
    vectors = vectors_held(problem.num_params, problem.dtype.itemsize)
    products = expected_products(tol, restarts=vectors < expected_products(tol))
    products = min(products, problem.num_params)
    passes = 2 * each * n + own
    cached = passes <= CACHE
    gradients = _LINEARISED + products * 2 if cached else products * 3
    found = {"gradient": Cost(0, 1.0, seconds, int(2 * own + min(each * n, CACHE)))}
    # Parameters at the point, vectors, and the image while it is orthogonalised.
    search = own * (1 + min(vectors, products) + 3) + min(passes, CACHE)
    for name in ("sharpness", "preconditioned_sharpness"):
        found[name] = Cost(products, gradients, gradients * seconds, int(search))
    for name, (losses, work) in _ALONG_STEP.items():
        memory = 5 * own + min(each * n, CACHE)
        found[name] = Cost(losses, work, work * seconds, int(memory))
    return found


def _timed_gradient(problem: MeanLoss, loss: Callable[[Theta, Any], Tensor]) -> tuple[float, float]:
    """Return the seconds of a gradient over all samples, and the bytes that a sample's pass saves."""
    with torch.inference_mode(False), problem.evaluation():
        batch, size = next(problem.chunks(_TIMED_SAMPLES))
        theta = problem.theta()

        def gradient() -> float:
            began = time.perf_counter()
            torch.autograd.grad(loss(theta, batch), theta, allow_unused=True)
            if problem.device.type == "cuda":
                torch.cuda.synchronize(problem.device)
            return time.perf_counter() - began

        try:
            one = saved_bytes(lambda: loss(theta, cut(batch, 0, 1)))
            two = saved_bytes(lambda: loss(theta, cut(batch, 0, 2)))
            each = float(one if size == 1 else max(two - one, 1))
        except RuntimeError:  # torch.func within the model excludes saved tensor hooks
            each = 0.0
        first = gradient()
        # What is set up on first use does not count, where trying again costs little.
        seconds = min(first, gradient()) if first < 1.0 else first
    return seconds * problem.own_samples / size, each
