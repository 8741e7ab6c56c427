"""`decide_together`: broadcasts rank 0's decisions and memory; `broadcast_tensors`: its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableopt.distributed.collectives import world
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.sinks.events import Decided
from stableopt.stability import StabilityMargins
from stableopt.steering.decision import Decision, DecisionLog

__all__ = ["broadcast_tensors", "decide_together", "decision_is_due", "new_margins"]

M = TypeVar("M")


def new_margins(monitor: StabilityMonitor, last: int | None) -> StabilityMargins | None:
    """Return the latest measurement, unless it is that of step ``last``."""
    margins = monitor.margins
    return None if margins is None or margins.step == last else margins


def decision_is_due(own: bool, monitor: StabilityMonitor) -> bool:
    """Return whether to call :func:`decide_together` at this step: the same answer on every rank.

    ``own`` is whether this rank sees something to decide. Ranks that measure together have the same
    measurements and rates, so they all see the same, and most steps need no communication. If ranks
    measure separately, none knows whether rank 0 has measured, so they decide together at every step.
    """
    return own or monitor.problem.ranks.size < world().size


def decide_together(
    decide: Callable[[], tuple[list[Decision], M]],
    log: DecisionLog,
    monitor: StabilityMonitor,
    *,
    dry_run: bool,
) -> tuple[list[Decision], M]:
    """Log and return rank 0's decisions on every rank, and its memory; its monitor delivers them.

    ``decide``, called on rank 0, returns the decisions and what to remember until the next call. A
    decision without a change is left out if it repeats the reason of the last one about its subject.
    An error of ``decide``, such as one of a user's law, is raised on every rank.
    """
    ranks = world()
    own: Any = ranks.raise_together(lambda: decide() if ranks.rank == 0 else None)
    decisions, memory = ranks.broadcast_object(own)
    logged = []
    for decision in decisions:
        decision = replace(decision, dry_run=dry_run)
        if decision.changes or not log.repeats(decision):
            log.append(decision)
            logged.append(decision)
            if ranks.rank == 0:
                monitor.deliver(Decided(decision.step, decision))
    monitor.close_together()
    return logged, memory


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` in place with those of rank 0; every rank must call it."""
    ranks = world()
    if ranks.several:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(ranks.broadcast(tensor))
