"""Agreement between the ranks of a distributed run: the first one decides, the others follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from torch import Tensor

from stableopt.distributed import world
from stableopt.steering.decision import Decision, Kind, What

__all__ = ["is_first", "shared_decisions", "shared_tensors", "shared_whole", "world_size"]

_KINDS, _WHATS = get_args(Kind), get_args(What)


def is_first() -> bool:
    """Return whether this process decides: rank 0, or one that is alone."""
    return world().rank == 0


def world_size() -> int:
    """Return how many processes train together."""
    return world().size


def shared_whole(value: int) -> int:
    """Return the value that rank 0 has; every rank must call it. Alone: ``value``."""
    return int(world().first(torch.tensor(value, dtype=torch.int64)))


def shared_tensors(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` by rank 0's, in place; every rank must call it."""
    ranks = world()
    with torch.no_grad():
        for tensor in tensors if ranks.several else ():
            tensor.copy_(ranks.first(tensor))


def shared_decisions(decisions: Sequence[Decision], *, step: int, most: int) -> list[Decision]:
    """Return rank 0's decisions, at most ``most``; every rank must call it. Alone: ``decisions``.

    The other ranks are told what changed, and not the words.
    """
    ranks = world()
    if not ranks.several:
        return list(decisions)
    table = torch.zeros(most, 6, dtype=torch.float64)
    for row, decision in zip(table, decisions, strict=False):
        what, kind = _WHATS.index(decision.what), _KINDS.index(decision.kind)
        numbers = [1, what, kind, decision.old, decision.new, decision.dry_run]
        row.copy_(torch.tensor(numbers, dtype=torch.float64))
    told = ranks.first(table)
    if ranks.rank == 0:
        return list(decisions)
    return [
        Decision(
            _WHATS[int(what)], _KINDS[int(kind)], old, new, "decided on rank 0", step=step,
            dry_run=bool(dry_run),
        )
        for present, what, kind, old, new, dry_run in told.tolist()
        if present
    ]  # fmt: skip
