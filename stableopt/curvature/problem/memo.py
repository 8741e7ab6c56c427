"""`Memo`: cached facts about a problem's parameters."""

from __future__ import annotations

from typing import Generic, TypeVar

from stableopt.curvature.problem.mean_loss import MeanLoss

__all__ = ["Memo"]

T = TypeVar("T")


class Memo(Generic[T]):
    """Cached facts about a problem's parameters, shared by all its coordinates.

    Each module that computes such facts has its own memo. The problem stores the values.

    >>> from torch import nn
    >>> import torch
    >>> from stableopt.curvature import Problem
    >>> problem = Problem(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(4, 2), torch.zeros(4, 1)))
    >>> widths = Memo[int]()
    >>> widths.of(problem)["layer"] = 2
    >>> widths.of(problem.transformed(sign=-1.0)), Memo[int]().of(problem)
    ({'layer': 2}, {})
    """

    def of(self, problem: MeanLoss) -> dict[str, T]:
        """Return the facts about ``problem``, by name."""
        return problem.memos.setdefault(self, {})
