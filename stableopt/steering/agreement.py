"""Agreement between the ranks of a distributed run: rank 0 decides, the others follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stableopt.distributed import world
from stableopt.steering.decision import Decision

__all__ = ["is_first", "shared_decisions", "shared_tensors", "shared_whole", "world_size"]


def is_first() -> bool:
    """Return whether this process decides: it is rank 0, or alone."""
    return world().rank == 0


def world_size() -> int:
    """Return how many processes train together."""
    return world().size


def shared_whole(value: int) -> int:
    """Return rank 0's value, or ``value`` if alone; every rank must call it."""
    return world().broadcast_object(value)


def shared_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with rank 0's, in place; every rank must call it."""
    ranks = world()
    with torch.no_grad():
        for tensor in tensors if ranks.several else ():
            tensor.copy_(ranks.broadcast(tensor))


def shared_decisions(decisions: Sequence[Decision]) -> list[Decision]:
    """Return rank 0's decisions, or ``decisions`` if alone; every rank must call it.

    On the other ranks the reason is that rank 0 decided: its own reasons may be about its own shard.
    """
    ranks = world()
    shared = ranks.broadcast_object(list(decisions))
    if ranks.rank == 0:
        return shared
    return [replace(decision, why="decided on rank 0") for decision in shared]
