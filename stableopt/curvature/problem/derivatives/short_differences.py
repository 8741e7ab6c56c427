r"""`short_difference`: a central difference over steps so short that no kink lies inside.

A network with ReLU or max-pooling is piecewise smooth. A difference over a long step averages over
several pieces, and two such averages may agree by chance. As the steps shrink, differences agree to many
digits once all points lie in one piece. Double precision allows steps down to 1e-9. In single precision
rounding dominates earlier, and often no step is usable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from stableopt.curvature.autodiff import central_difference, displaced

__all__ = ["LEAST_LOSS", "Difference", "generic_point", "short_difference", "tolerance"]

V = TypeVar("V", float, Tensor)

LEAST_LOSS = 0.01
"""A smaller loss is rounded like a loss of this size: a cross entropy is a difference of logits.
A gradient is rounded like this loss over the norm of the point: where a softmax saturates, it is a
difference of probabilities near 1."""

_STEPS = {torch.float64: (1e-5, 1e-6, 1e-7, 1e-8, 1e-9), torch.float32: (1e-2, 1e-3, 1e-4)}
"""Steps relative to the norm of the point. In double precision, rounding is 1e-7 of a
difference over the shortest."""

_SHORTEST = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Shortest step that may confirm a derivative: over a step of 1e-3 the slopes of a network of 20 million
parameters changed by half."""

_SETTLED = 1e-6
"""Relative gap of two differences at which shorter steps are not tried: too small for chance."""

_TOLERANCE = {torch.float64: 2e-3, torch.float32: 0.02}
"""Relative error of a derivative that rounding does not explain: smooth networks stay below 1e-6 and
1e-3."""

_MANY = 2**18
"""Length above which noise is drawn in the precision of the point: double takes four times as long."""

_AWAY = 1e-3
"""Relative distance of the generic point from the given point."""


@dataclass(frozen=True)
class Difference(Generic[V]):
    """A confirmed central difference.

    Attributes:
        value: the difference.
        gap: its distance from the difference over the neighbouring step, or from the expected value.
    """

    value: V
    gap: float


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error above which a derivative computed in ``dtype`` is wrong."""
    return _TOLERANCE[dtype]


def short_difference(
    along: Callable[[float], V],
    size: float,
    dtype: torch.dtype,
    *,
    scale: float = 0.0,
    noise: float = 0.0,
    expected: V | None = None,
) -> Difference[V] | None:
    """Return the central difference of ``along`` at 0 that agrees best with a neighbouring step's.

    ``None`` if no two neighbouring steps agree to a quarter of :func:`tolerance`. A difference that
    agrees with ``expected``, to the tolerance, is returned without a comparison of steps.

    Args:
        along: a function of the distance from a point.
        size: the norm of the point; steps are relative to it.
        dtype: the precision of the function.
        scale: gaps are relative to the difference, or to ``scale`` if it is larger.
        noise: the rounding error of a value; steps are skipped where it would matter.
        expected: the derivative that is to be confirmed.

    >>> difference = short_difference(lambda h: abs(h + 1e-4), 1.0, torch.float64)
    >>> round(difference.value, 6)
    1.0
    """
    best: Difference[V] | None = None
    previous: V | None = None
    if expected is not None:
        confirmed = _confirmed(along, size, dtype, noise, expected)
        if confirmed is not None:
            return confirmed
    accepted = tolerance(dtype) / 4
    for step in _STEPS[dtype]:
        value = central_difference(along, step * size)
        magnitude = max(_norm(value), scale)
        if noise / (step * size) > accepted * magnitude:
            break
        if previous is not None:
            gap = _norm(value - previous)
            if gap <= accepted * magnitude and (best is None or gap < best.gap):
                best = Difference(value, gap)
            if gap <= _SETTLED * magnitude:
                break
        previous = value
    return best


def _confirmed(
    along: Callable[[float], V],
    size: float,
    dtype: torch.dtype,
    noise: float,
    expected: V,
) -> Difference[V] | None:
    """Return the difference over the shortest step that rounding allows, if it agrees with ``expected``.

    Over longer steps agreement may be chance: a staircase has the mean slope of its ramp.
    """
    accepted = tolerance(dtype) * _norm(expected)
    for step in (_SHORTEST[dtype], *reversed(_STEPS[dtype])):
        if noise / (step * size) <= accepted:
            value = central_difference(along, step * size)
            gap = _norm(value - expected)
            return Difference(value, gap) if gap <= accepted else None
    return None


def _norm(value: float | Tensor) -> float:
    return float(value.norm()) if isinstance(value, Tensor) else abs(value)


def generic_point(point: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves near ``point`` that avoid kinks, on which zero biases after zero padding lie."""
    generator = torch.Generator().manual_seed(0)
    overall, *sizes = _root_mean_squares(point)
    near: list[Tensor] = []
    for t, size in zip(point, sizes, strict=True):  # one at a time, since a model may be large
        dtype = t.dtype if t.numel() > _MANY else torch.float64
        noise = torch.randn(t.shape, generator=generator, dtype=dtype, device="cpu").to(t)
        near += displaced([t], [noise.mul_(size or overall or 1.0)], _AWAY)
    return near


def _root_mean_squares(point: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of all entries and that of each tensor, with one host transfer."""
    sums, means = [], []
    for t in point:
        squares = t.detach().square()
        sums.append(squares.sum())
        means.append(squares.mean() if t.numel() else sums[-1])
    overall = torch.stack(sums).sum() / sum(t.numel() for t in point)
    roots: list[float] = torch.stack([overall, *means]).sqrt().tolist()
    return roots
