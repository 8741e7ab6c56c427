"""Power iteration: two vectors of memory, and more products than Lanczos."""

from __future__ import annotations

import math

import torch

from stableopt.curvature.eigen.inner_product import (
    Dual,
    check_norm,
    dot,
    dual,
    magnitude_of,
    normalised,
    on_host,
    scaled,
)
from stableopt.curvature.eigen.result import Eigenpair, small_enough
from stableopt.curvature.errors import NonFiniteError
from stableopt.curvature.operator import Operator, Preconditioner

__all__ = ["power"]


def power(
    operator: Operator,
    first: Dual,
    *,
    preconditioner: Preconditioner | None,
    tol: float,
    max_iter: int,
) -> Eigenpair:
    """Return the top eigenpair of P H, by iterating with P H + c from the pair ``first`` of norm 1."""
    eps = torch.finfo(operator.dtype).eps
    current, shift, scale, magnitude = first, 0.0, 0.0, None
    for products in range(1, max_iter + 1):
        product = operator @ current.vector
        magnitude = magnitude_of(product) if magnitude is None else magnitude
        image = dual(product / magnitude, preconditioner)
        rayleigh = dot(current.vector, image.covector)
        rest = image.covector - rayleigh * current.covector
        square = dot(rest, image.vector - rayleigh * current.vector)
        column = torch.stack([rayleigh, square.clamp(min=0).sqrt(), image.norm, magnitude])
        value, residual, norm, unit = on_host(column, operator).tolist()
        if not math.isfinite(value):
            raise NonFiniteError(f"product {products} with {type(operator).__name__} is not finite")
        check_norm(norm, preconditioner)
        scale = max(scale, norm)
        # norm - value vanishes on an eigenvector of a positive eigenvalue and is 2|value| on one of
        # a negative: enough to put the largest eigenvalue first whatever lies below.
        shift = max(shift, norm - value)
        aligned = value > 0 or shift >= norm
        converged = aligned and small_enough(residual, value, scale, tol, eps)
        if converged or products == max_iter:
            vector = normalised(current.vector)
            return Eigenpair(value * unit, vector, residual * unit, products, converged)
        covector = image.covector + shift * current.covector
        vector = image.vector + shift * current.vector
        if preconditioner is None:
            vector = covector
        current = scaled(Dual(covector, vector, dot(covector, vector).sqrt()))
    raise AssertionError("unreachable: max_iter is at least 1")
