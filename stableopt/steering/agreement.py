"""`decide_together`: broadcasts rank 0's decisions; `broadcast_tensors`: broadcasts its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from stableopt.distributed.collectives import world
from stableopt.sinks.events import Decided, Event
from stableopt.steering.decision import Decision, DecisionLog

__all__ = ["broadcast_tensors", "decide_together"]


def decide_together(
    decide: Callable[[], list[Decision]],
    log: DecisionLog,
    deliver: Callable[[Event], object],
    *,
    dry_run: bool,
) -> Iterator[Decision]:
    """Yield and log rank 0's decisions on every rank; rank 0 also delivers them to the sinks.

    ``decide`` is called on rank 0. A decision without a change is left out if it repeats the reason of
    the last one about its subject.
    """
    ranks = world()
    decisions: list[Decision] = []
    if ranks.rank == 0:
        decisions = [replace(decision, dry_run=dry_run) for decision in decide()]
    for decision in ranks.broadcast_object(decisions):
        if decision.changes or not log.repeats(decision):
            log.append(decision)
            if ranks.rank == 0:
                deliver(Decided(decision.step, decision))
            yield decision


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` in place with those of rank 0; every rank must call it."""
    ranks = world()
    if ranks.several:
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(ranks.broadcast(tensor))
