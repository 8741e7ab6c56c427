"""`EstimatedProjection`: an operator's projection on a basis, estimated from few products.

:mod:`~stableopt.curvature.eigen.follow` chooses its products by it. All matrices are small, in float64
on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["EstimatedProjection", "probe"]

_OVERTAKEN = 0.01
"""Relative excess over the tested value from which an estimated top direction is tested."""

_DOUBT = (0.5, 0.03)
"""The runner-up is tested if its estimate plus 0.5 of the probe's residual exceeds 1.03 times the tested
value."""

_EXPLORER = 0.3
"""Weight of the explorer in the probe, relative to the norm of the other weights."""

_EXPLORATION_RATES = (0.3, 0.1)
"""Probability that two more products explore: while every residual was small, and otherwise. Without
them, eigenvalues that rose among nine fixed eigenvectors were at times lost for five searches."""

_UNTESTED = 0.5
"""Norm of the component orthogonal to the tested directions from which a unit vector is untested."""

_ROUNDING = 1e-6
"""Relative norm of a rounding error in single precision."""


def probe(count: int, generator: torch.Generator) -> Tensor:
    """Return the probe's coordinates ``(k,)``. Random signs keep errors from adding up."""
    weights = torch.arange(count, dtype=torch.float64, device="cpu").clamp(min=1) ** -0.5
    weights[0] = 0.0
    weights[-1] = _EXPLORER * weights[:-1].norm()
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    weights[draws < 0.5] *= -1
    unit: Tensor = weights / weights.norm()
    return unit


class EstimatedProjection:
    """The operator's projection on a basis: exact in the tested directions, estimated in the others.

    A direction is tested if its product with the operator is known. The basis holds the k kept
    directions, then the components of the products orthogonal to these.

    Args:
        weights: coordinates ``(k,)`` of the probe.
        first: the product with the first kept direction, in coordinates of the basis.
        second: the product with the probe.
        generator: of the random choices.
    """

    def __init__(
        self, weights: Tensor, first: Tensor, second: Tensor, generator: torch.Generator
    ) -> None:
        self._kept = kept = len(weights)
        start = torch.zeros(kept, dtype=torch.float64, device="cpu")
        start[0] = 1.0
        self._tested = pad(torch.stack([start, weights]), (0, len(second) - kept))
        self._images = torch.stack([pad(first, (0, len(second) - len(first))), second])
        estimates = second[1:kept] / weights[1:]
        self._diagonal = torch.cat([first[:1], estimates])
        # A direction outside the kept ones was not among the largest.
        self._default_diagonal = float(self._diagonal.min())
        self._probe_residual = float(second[kept:].norm())
        self._explorer_image = 1
        self._exploration_draw, row = torch.rand(
            2, generator=generator, dtype=torch.float64, device="cpu"
        ).tolist()
        # The explorer, and a random kept direction. The square favours the first ones.
        self._to_explore = [kept - 1, 1 + int(row**2 * (kept - 2))]
        self._always_settled = True

    def learn(self, direction: Tensor, image: Tensor) -> None:
        """Add the product with a direction of norm 1 that is orthogonal to the tested ones."""
        more = len(image) - self._images.shape[1]
        direction = pad(direction, (0, len(image) - len(direction)))
        self._tested = torch.cat([pad(self._tested, (0, more)), direction[None]])
        self._images = torch.cat([pad(self._images, (0, more)), image[None]])

    def tested_top(self) -> tuple[float, Tensor, float, float]:
        """Return the top Ritz pair of the tested directions: value, coordinates of the vector, residual.

        The fourth number is the largest norm of a product.
        """
        projected = self._tested @ self._images.T
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        value, weights = float(values[-1]), vectors[:, -1]
        top = weights @ self._tested
        residual = float((weights @ self._images - value * top).norm())
        return value, top, residual, float(self._images.norm(dim=1).max())

    def estimated_pairs(self) -> tuple[Tensor, Tensor]:
        """Return Ritz values and vectors, as rows, largest first, of the estimated projection.

        It is the diagonal of estimates with the least symmetric change that agrees with all products.
        """
        size, tested = self._images.shape[1], self._tested
        diagonal = pad(self._diagonal, (0, size - self._kept), value=self._default_diagonal)
        errors = self._images - tested * diagonal
        projected = torch.diag(diagonal) + errors.T @ tested + tested.T @ errors
        projected -= tested.T @ (errors @ tested.T) @ tested
        # A product inside the basis left a row of zeros: give it the lowest value.
        empty = (self._images.abs().amax(0) == 0) & (tested.abs().amax(0) == 0)
        projected.diagonal()[empty] = -10 * (1 + self._images.abs().max())
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        return values.flip(0), vectors.T.flip(0)

    def overtaken(self, value: float) -> bool:
        """Return whether the estimated top value exceeds the tested ``value`` by more than 1 %."""
        return _exceeds(float(self.estimated_pairs()[0][0]), value)

    def next_direction(self, value: float, settled: bool, enough: bool) -> Tensor | None:
        """Return the direction to test next, of norm 1 and orthogonal to the tested ones.

        ``None`` if all have been tested, or if ``enough`` have been and no estimate asks for another.
        ``settled`` says that the residual of the tested ``value`` is small.
        """
        values, vectors = self.estimated_pairs()
        self._always_settled = self._always_settled and settled
        untested = self._orthogonal_to_tested(vectors)
        norms: list[float] = untested.norm(dim=1).tolist()
        units: Tensor = untested / untested.norm(dim=1, keepdim=True).clamp(min=1e-300)
        overtaken = _exceeds(float(values[0]), value)
        if (not settled and norms[0] > 1e-9) or (overtaken and norms[0] > 1e-3):
            return units[0]
        runner_up = next((i for i, norm in enumerate(norms) if norm > _UNTESTED), None)
        if runner_up is not None:
            residual_share, excess = _DOUBT
            optimistic = float(values[runner_up]) + residual_share * self._probe_residual
            doubtful = optimistic > value + excess * abs(value)
            explorer_considered = self._to_explore[:1] != [self._kept - 1]
            if doubtful or (not enough and explorer_considered and optimistic > value):
                return units[runner_up]
        probability = _EXPLORATION_RATES[0 if self._always_settled else 1]
        while self._to_explore and (not enough or self._exploration_draw < probability):
            index = self._to_explore.pop(0)
            axis = torch.eye(self._images.shape[1], dtype=torch.float64, device="cpu")[index]
            direction = self._orthogonal_to_tested(axis)
            norm = float(direction.norm())
            if norm > _UNTESTED:
                if index == self._kept - 1:
                    self._explorer_image = len(self._images)
                return direction / norm
        largest = max(range(len(norms)), key=norms.__getitem__)
        if enough or norms[largest] <= _ROUNDING:
            return None
        return units[largest]

    def _orthogonal_to_tested(self, directions: Tensor) -> Tensor:
        """Return the components of directions orthogonal to the tested ones."""
        for _ in range(2):
            directions = directions - (directions @ self._tested.T) @ self._tested
        return directions

    def explorer(self, kept: Tensor) -> Tensor:
        """Return the next search's explorer, of norm 1 or zero, orthogonal to the rows ``kept``.

        It is the component of the product with the explorer, or with the probe if the explorer was not
        tested.
        """
        image = self._images[self._explorer_image]
        component: Tensor = image - (kept @ image) @ kept
        norm = float(component.norm())
        if norm > _ROUNDING * float(image.norm()):
            return component / norm
        return torch.zeros_like(component)


def _exceeds(estimated: float, value: float) -> bool:
    return estimated > value + _OVERTAKEN * abs(value)
