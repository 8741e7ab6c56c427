"""Decisions and weights of rank 0 on every rank of a distributed run."""

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
    """Yield on every rank what ``decide()`` returns on rank 0; log it, and deliver it there.

    A decision that changes nothing, for the same reason as before, is left out.
    """
    ranks = world()
    decided = [replace(each, dry_run=dry_run) for each in decide()] if ranks.rank == 0 else []
    for decision in ranks.broadcast_object(decided):
        if decision.changes or not log.repeats(decision):
            log.append(decision)
            if ranks.rank == 0:
                deliver(Decided(decision.step, decision))
            yield decision


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with rank 0's, in place; every rank must call it."""
    ranks = world()
    with torch.no_grad():
        for tensor in tensors if ranks.several else ():
            tensor.copy_(ranks.broadcast(tensor))
