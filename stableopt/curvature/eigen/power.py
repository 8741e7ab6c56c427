"""Power iteration: it holds two vectors, and takes more products than Lanczos."""

from __future__ import annotations

import torch

from stableopt.curvature.eigen.inner_product import Dual
from stableopt.curvature.eigen.result import Eigenpair, Search

__all__ = ["power"]


def power(search: Search, first: Dual, max_iter: int) -> Eigenpair:
    """Return the top eigenpair of P H, by iterating P H + c from ``first``, of norm 1."""
    operator, inner = search.operator, search.inner
    current, shift, scale, magnitude = first, 0.0, 0.0, None
    for products in range(1, max_iter + 1):
        product = operator @ current.vector
        magnitude = inner.magnitude(product) if magnitude is None else magnitude
        image = inner.dual(product / magnitude)
        rayleigh = inner.dot(current.vector, image.covector)
        rest = image.covector - rayleigh * current.covector
        square = inner.dot(rest, image.vector - rayleigh * current.vector)
        column = torch.stack([rayleigh, square.clamp(min=0).sqrt(), image.norm, magnitude])
        numbers = inner.on_host(column)
        value, residual, norm, unit = numbers.tolist()
        inner.check_product(numbers[:1], norm, products, operator)
        scale = max(scale, norm)
        # norm - value vanishes on an eigenvector of a positive eigenvalue and is 2|value| on one of
        # a negative: enough to put the largest eigenvalue first, with any others below.
        shift = max(shift, norm - value)
        aligned = value > 0 or shift >= norm
        converged = aligned and search.small_enough(residual, value, scale)
        if converged or products == max_iter:
            vector = current.vector / inner.norm(current.vector)
            return Eigenpair(value * unit, vector, residual * unit, products, converged)
        current = inner.add(image, shift, current).normalised()
    raise AssertionError("unreachable: max_iter is at least 1")
