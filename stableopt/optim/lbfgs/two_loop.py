"""`TwoLoopPairs`: L-BFGS directions by the two-loop recursion, in the same operations as torch."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from stableopt.optim.lbfgs.line_search import Number
from stableopt.optim.lbfgs.memory import Move, damped_share

__all__ = ["TwoLoopPairs"]

TORCHS_CURVATURE = 1e-10
"""Smallest curvature ``y @ s`` of a pair that is kept, as in torch."""


class TwoLoopPairs:
    """A memory of pairs in lists, with the two-loop recursion (Nocedal, 1980)."""

    def __init__(self, capacity: int, state: dict[str, Any]) -> None:
        self.capacity = capacity
        self._changes: list[Tensor] = list(state.get("old_dirs") or [])[-capacity:]
        self._steps: list[Tensor] = list(state.get("old_stps") or [])[-capacity:]
        self._inverses: list[Number] = list(state.get("ro") or [])[-capacity:]
        self._gamma: Number = state.get("H_diag", 1)

    def clear(self) -> None:
        """Remove all pairs."""
        self._changes, self._steps, self._inverses, self._gamma = [], [], [], 1

    def numbers(self, *values: Any) -> list[Number]:
        """Return the values unchanged: torch compares tensors."""
        return list(values)

    def products(self, move: Move, gradient: Tensor) -> list[Tensor]:
        """Return no products: :meth:`update` computes its own."""
        return []

    def update(self, move: Move, gradient: Tensor, products: list[Number], damping: float) -> None:
        """Keep the pair of a move that ended at ``gradient``, if it has curvature."""
        y, s = gradient.sub(move.gradient), move.direction.mul(move.t)
        if damping and self._changes:
            reference = float(s.dot(s)) / float(self._gamma)
            share = damped_share(float(y.dot(s)), reference, damping)
            if share < 1:
                y.mul_(share).add_(s, alpha=(1 - share) / float(self._gamma))
        curvature, change = y.dot(s), y.dot(y)
        if curvature > TORCHS_CURVATURE and math.isfinite(curvature) and math.isfinite(change):
            if len(self._changes) == self.capacity:
                for oldest in (self._changes, self._steps, self._inverses):
                    oldest.pop(0)
            self._changes.append(y)
            self._steps.append(s)
            self._inverses.append(1.0 / curvature)
            self._gamma = curvature / change

    def descent(self, gradient: Tensor) -> Tensor:
        """Return -P times ``gradient``, which does not change."""
        return self._recursion(gradient.neg())

    def _recursion(self, vector: Tensor) -> Tensor:
        """Return P times ``vector``, which is overwritten."""
        pairs = list(zip(self._changes, self._steps, self._inverses, strict=True))
        shares: deque[Tensor] = deque()
        for y, s, inverse in reversed(pairs):
            shares.appendleft(s.dot(vector) * inverse)
            vector.add_(y, alpha=-float(shares[0]))
        result = torch.mul(vector, self._gamma)
        for (y, s, inverse), share in zip(pairs, shares, strict=True):
            result.add_(s, alpha=float(share - y.dot(result) * inverse))
        return result

    def matvec(self, vectors: Tensor) -> Tensor:
        """Return P times ``(d,)`` or ``(d, k)``."""
        if vectors.dim() == 1:
            return self._recursion(vectors.clone())
        columns = [self._recursion(column.clone()) for column in vectors.unbind(1)]
        return torch.stack(columns, dim=1) if columns else torch.zeros_like(vectors)

    def export(self) -> dict[str, Any]:
        """Return the pairs in the form of the state of ``torch.optim.LBFGS``."""
        return {
            "old_dirs": self._changes,
            "old_stps": self._steps,
            "ro": self._inverses,
            "H_diag": self._gamma,
        }
