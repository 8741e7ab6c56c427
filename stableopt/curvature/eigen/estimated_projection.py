"""`EstimatedProjection`: what a search that follows an eigenpair knows and estimates of its operator.

All of it is small matrices in float64 on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["EstimatedProjection", "probe"]

_OVERTAKEN = 0.01
"""An estimated value that exceeds the tested one by this part of it asks for a product."""

_DOUBT = (0.5, 0.03)
"""So does one that would exceed 1.03 times the tested value with half the probe's residual added."""

_EXPLORER = 0.3
"""Weight of the explorer in the probe, relative to all others together."""

_CURIOUS = (0.3, 0.1)
"""Probability that two more products explore, at rest and while the top is moving. Without them,
eigenvalues that rose among nine fixed eigenvectors were at times lost for five searches."""

_UNTESTED = 0.5
"""Norm of the part outside the tested directions that makes a direction untested."""

_ROUNDING = 1e-6
"""Relative norm of what is rounding in single precision."""


def probe(count: int, generator: torch.Generator) -> Tensor:
    """Return the probe's coordinates ``(k,)``, with random signs, so that errors do not add up."""
    weights = torch.arange(count, dtype=torch.float64).clamp(min=1) ** -0.5
    weights[0] = 0.0
    weights[-1] = _EXPLORER * weights[:-1].norm()
    weights[torch.rand(count, generator=generator, dtype=torch.float64) < 0.5] *= -1
    unit: Tensor = weights / weights.norm()
    return unit


class EstimatedProjection:
    """The operator's projection on a basis: exact in the tested directions, estimated in the others.

    The basis holds the k kept directions first, then what the images have outside these.

    Args:
        weights: coordinates ``(k,)`` of the probe.
        first: image of the first kept direction, in coordinates of the basis.
        second: image of the probe.
        generator: of the random choices.
    """

    def __init__(
        self, weights: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
    ) -> None:
        self._kept = kept = len(weights)
        start = torch.zeros(kept, dtype=torch.float64)
        start[0] = 1.0
        self._tested = pad(torch.stack([start, weights]), (0, len(second) - kept))
        self._images = torch.stack([pad(first, (0, len(second) - len(first))), second])
        estimates = second[1:kept] / weights[1:]
        self._diagonal = torch.cat([first[:1], estimates])
        # Of a direction outside the kept ones it is only known that it was none of them.
        self._guess = float(self._diagonal.min())
        self._noise = float(second[kept:].norm())
        self._explored = 1
        self._keen, row = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        # Squared: the better ones more often.
        self._wishes = [kept - 1, 1 + int(row**2 * (kept - 2))]
        self._calm = True

    def learn(self, direction: Tensor, image: Tensor) -> None:
        """Add the image of a direction of norm 1 that is orthogonal to the tested ones."""
        more = len(image) - self._images.shape[1]
        direction = pad(direction, (0, len(image) - len(direction)))
        self._tested = torch.cat([pad(self._tested, (0, more)), direction[None]])
        self._images = torch.cat([pad(self._images, (0, more)), image[None]])

    def tested_top(self) -> tuple[float, Tensor, float, float]:
        """Return the top Ritz value of the tested directions, its vector's coordinates, its residual,
        and the largest norm of an image.
        """
        projected = self._tested @ self._images.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        value, weights = float(values[-1]), vectors[:, -1]
        best = weights @ self._tested
        residual = float((weights @ self._images - value * best).norm())
        return value, best, residual, float(self._images.norm(dim=1).max())

    def estimated_pairs(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values and vectors, as rows, largest first, of the estimated projection.

        It has the estimates on its diagonal, and the least change that agrees with all images.
        """
        size, tested = self._images.shape[1], self._tested
        diagonal = pad(self._diagonal, (0, size - self._kept), value=self._guess)
        wrong = self._images - tested * diagonal
        projected = torch.diag(diagonal) + wrong.T @ tested + tested.T @ wrong
        projected -= tested.T @ (wrong @ tested.T) @ tested
        # A row of zeros, from an image with no part outside the basis, comes last.
        empty = (self._images.abs().amax(0) == 0) & (tested.abs().amax(0) == 0)
        projected.diagonal()[empty] = -10 * (1 + self._images.abs().max())
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        return values.flip(0), vectors.T.flip(0)

    def overtaken(self, value: float) -> bool:
        """Return whether a direction is estimated to lie above the tested ``value``."""
        return _above(float(self.estimated_pairs()[0][0]), value)

    def next_direction(self, value: float, settled: bool, enough: bool) -> Tensor | None:
        """Return the direction to test next, of norm 1 and orthogonal to the tested ones.

        ``None`` if all have been tested, or if ``enough`` have been and no estimate asks for another.
        ``settled`` says that the residual of the tested ``value`` is small.
        """
        values, vectors = self.estimated_pairs()
        self._calm = self._calm and settled
        outside = self._outside(vectors)
        norms: list[float] = outside.norm(dim=1).tolist()
        units: Tensor = outside / outside.norm(dim=1, keepdim=True).clamp(min=1e-300)
        overtaken = _above(float(values[0]), value)
        if (not settled and norms[0] > 1e-9) or (overtaken and norms[0] > 1e-3):
            return units[0]
        runner_up = next((i for i, norm in enumerate(norms) if norm > _UNTESTED), None)
        if runner_up is not None:
            part, above = _DOUBT
            hopeful = float(values[runner_up]) + part * self._noise
            turn = not enough and self._wishes[:1] != [self._kept - 1]
            if hopeful > value + above * abs(value) or (turn and hopeful > value):
                return units[runner_up]
        while self._wishes and (not enough or self._keen < _CURIOUS[0 if self._calm else 1]):
            index = self._wishes.pop(0)
            wish = self._outside(torch.eye(self._images.shape[1], dtype=torch.float64)[index])
            norm = float(wish.norm())
            if norm > _UNTESTED:
                if index == self._kept - 1:
                    self._explored = len(self._images)
                return wish / norm
        largest = max(range(len(norms)), key=norms.__getitem__)
        if enough or norms[largest] <= _ROUNDING:
            return None
        return units[largest]

    def _outside(self, directions: Tensor) -> Tensor:
        """Return the parts of directions outside the tested ones."""
        for _ in range(2):
            directions = directions - (directions @ self._tested.T) @ self._tested
        return directions

    def explorer(self, kept: Tensor) -> Tensor:
        """Return the direction to explore later, of norm 1 or zero, orthogonal to the rows ``kept``.

        It is the rest of the explorer's image, or of the probe's if the explorer was not tested.
        """
        image = self._images[self._explored]
        rest: Tensor = image - (kept @ image) @ kept
        norm = float(rest.norm())
        return rest / norm if norm > _ROUNDING * float(image.norm()) else torch.zeros_like(rest)


def _above(estimated: float, value: float) -> bool:
    return estimated > value + _OVERTAKEN * abs(value)
