"""Changes of the weights by steering: `LastGood` restores a snapshot, `kick` perturbs them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.collectives import world
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.stability.rules.coordinates import in_rule_coordinates, outside_coordinates
from stableopt.steering.agreement import broadcast_tensors

__all__ = ["LastGood", "kick"]


_WRITTEN = {
    *("d", "d_max", "d_numerator", "d_denom", "d_hat", "k"),  # Prodigy, D-Adaptation
    *("numerator_weighted", "gsq_weighted", "sk_l1"),  # D-Adaptation
    *("weight_sum", "lr_max", "scheduled_lr"),  # schedule-free
}
"""Numbers of a parameter group that the steps of optimizers write; others are hyperparameters."""


class LastGood:
    """A snapshot of parameters, buffers and optimizer state.

    The state includes what the steps of some optimizers write into their parameter groups, such as
    Prodigy's estimates, but no hyperparameter, which a schedule or the user may have changed.

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
        self._written: dict[int, dict[str, Any]] = {}  # by the first parameter of a group

    def keep(self) -> None:
        """Take a snapshot."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        # The optimizer may hold parameters outside the model; each tensor is copied once.
        tensors = {id(t): t for t in [*params, *self._model.parameters(), *self._model.buffers()]}
        self._saved = [(t, t.detach().clone()) for t in tensors.values()]
        self._states = [(p, copy.deepcopy(self._optimizer.state.get(p, {}))) for p in params]
        self._written = {
            id(group["params"][0]): _copied(group, group.keys() & _WRITTEN)
            for group in self._optimizer.param_groups
            if group["params"]
        }

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
        for group in groups:
            written = self._written.get(id(group["params"][0]), {}) if group["params"] else {}
            group.update(_copied(written, written))


def _copied(entries: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the named entries; tensors among them are copied."""
    named = ((name, entries[name]) for name in names)
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in named}


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
