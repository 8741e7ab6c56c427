"""Changes of the weights by steering: `LastGood` restores a snapshot, `kick` perturbs them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.collectives import world
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability.rules.coordinates import in_rule_coordinates, outside_coordinates
from stableopt.steering.agreement import broadcast_tensors

__all__ = ["LastGood", "kick"]


_SCHEDULED = {
    *("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay"),
    *("momentum", "base_momentum", "max_momentum", "betas"),
}
"""Numbers of a parameter group that schedules write, rather than the steps of the optimizer."""


class LastGood:
    """A snapshot of parameters, buffers and optimizer state.

    The state includes the numbers that some optimizers keep in their parameter groups, such as
    Prodigy's estimates, but no hyperparameter that a schedule may have changed.

    >>> model = nn.Linear(1, 1)
    >>> good = LastGood(torch.optim.SGD(model.parameters(), lr=0.1), model)
    >>> good.keep()
    >>> _ = nn.init.constant_(model.weight, float("nan"))
    >>> good.put_back()
    >>> bool(model.weight.isfinite())
    True
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._states: list[tuple[Tensor, dict[str, Any]]] = []
        self._numbers: list[dict[str, Any]] = []

    def keep(self) -> None:
        """Take a snapshot."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        # The optimizer may hold parameters outside the model; each tensor is copied once.
        tensors = {id(t): t for t in [*params, *self._model.parameters(), *self._model.buffers()]}
        self._saved = [(t, t.detach().clone()) for t in tensors.values()]
        self._states = [(p, copy.deepcopy(self._optimizer.state.get(p, {}))) for p in params]
        self._numbers = [_numbers(group) for group in self._optimizer.param_groups]

    def keep_finite(self) -> bool:
        """Take a snapshot if the optimizer's parameters are finite; return whether they are."""
        params = (p for group in self._optimizer.param_groups for p in group["params"])
        finite = all(bool(p.isfinite().all()) for p in params)
        if finite:
            self.keep()
        return finite

    def put_back(self) -> None:
        """Restore the snapshot. Parameters that joined the optimizer since lose their state."""
        with torch.no_grad():
            for tensor, saved in self._saved:
                tensor.copy_(saved)
        groups = self._optimizer.param_groups
        states: dict[Tensor, dict[str, Any]] = {p: {} for group in groups for p in group["params"]}
        for p, state in (states | dict(self._states)).items():
            if state:
                self._optimizer.state[p] = copy.deepcopy(state)
            else:
                self._optimizer.state.pop(p, None)
        for group, numbers in zip(groups, self._numbers, strict=False):  # groups may have joined
            group.update(copy.deepcopy(numbers))


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the numbers in ``group`` that the optimizer's steps may write."""
    return {
        name: copy.deepcopy(value)
        for name, value in group.items()
        if name not in _SCHEDULED
        and (isinstance(value, (int, float, Tensor)) and not isinstance(value, bool))
    }


def kick(monitor: StabilityMonitor, size: float) -> None:
    """Move the weights where the step is the least stable, by ``size`` times their norm.

    Rank 0 moves its weights, and every rank gets them: all must call it. An error of rank 0 is raised
    on all.
    """
    params, ranks = monitor.problem.params, world()

    def move() -> None:
        if ranks.rank == 0:
            _kick_along(params, _least_stable_direction(monitor), size)

    ranks.raise_together(move)
    broadcast_tensors(params)


def _kick_along(params: Sequence[Tensor], tangents: Sequence[Tensor], size: float) -> None:
    """Move ``params`` in place along ``tangents``, by ``size`` times the norm of ``params``."""
    params = [real_view(p.detach()) for p in params]
    norm = sum(float(p.square().sum()) for p in params) ** 0.5
    length = sum(float(t.square().sum()) for t in tangents) ** 0.5
    with torch.no_grad():
        for p, tangent in zip(params, tangents, strict=True):
            p.add_(tangent * (size * norm / length))


def _least_stable_direction(monitor: StabilityMonitor) -> list[Tensor]:
    """Return the direction of the parameters in which the step is the least stable."""
    rule, eigenvectors = monitor.update_rule, monitor.eigenvectors
    problem = in_rule_coordinates(monitor.problem, rule, monitor.optimizers)
    if "preconditioned_sharpness" not in eigenvectors:
        return problem.unflatten(eigenvectors["sharpness"])
    direction = eigenvectors["preconditioned_sharpness"]
    preconditioner = outside_coordinates(rule, problem.params)
    if preconditioner is not None:
        # Then the eigenvector is a covector, which P maps to a direction.
        direction = preconditioner @ direction
    return problem.unflatten(direction)
