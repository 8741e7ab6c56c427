"""Changes of the weights by steering: a rollback to good ones, or a kick along a direction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.parameters import real_view

__all__ = ["LastGood", "kick_along"]


class LastGood:
    """A copy of parameters, buffers and optimizer state, to restore.

    >>> model = nn.Linear(1, 1)
    >>> good = LastGood(torch.optim.SGD(model.parameters(), lr=0.1), model)
    >>> good.keep(step=5)
    >>> _ = nn.init.constant_(model.weight, float("nan"))
    >>> good.put_back()
    >>> bool(model.weight.isfinite())
    True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._states: list[tuple[Tensor, dict[str, Any]]] = []
        self.step: int | None = None

    def keep(self, step: int) -> None:
        """Copy the present state, after ``step`` steps."""
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        # Includes parameters of the optimizer outside the model; each tensor once.
        tensors = {id(t): t for t in [*held, *self._model.parameters(), *self._model.buffers()]}
        self._saved = [(t, t.detach().clone()) for t in tensors.values()]
        self._states = [(p, copy.deepcopy(self._optimizer.state.get(p, {}))) for p in held]
        self.step = step

    def put_back(self) -> None:
        """Restore the copied state of the model and the optimizer."""
        with torch.no_grad():
            for tensor, saved in self._saved:
                tensor.copy_(saved)
        for p, state in self._states:
            if state:
                self._optimizer.state[p] = copy.deepcopy(state)
            else:
                self._optimizer.state.pop(p, None)


def kick_along(params: Sequence[Tensor], tangents: Sequence[Tensor], size: float) -> None:
    """Move parameters along ``tangents``, one for each, by ``size`` times their norm, in place."""
    params = [real_view(p.detach()) for p in params]
    norm = torch.sqrt(sum((p.square().sum() for p in params), torch.tensor(0.0)))
    length = torch.sqrt(sum((t.square().sum() for t in tangents), torch.tensor(0.0)))
    with torch.no_grad():
        for p, tangent in zip(params, tangents, strict=True):
            p.add_(tangent * (size * norm / length))
