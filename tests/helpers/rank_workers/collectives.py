"""Calls of every collective, with errors and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rank_workers.shares import group
from stableopt.distributed.collectives import Ranks


def collectives() -> dict[str, Any]:
    """Call every collective, with errors and without."""
    ranks, rank = Ranks(group()), dist.get_rank()
    own = torch.full((1,), float(rank))

    class LocalError(ArithmeticError):
        """A class that no other rank can find."""

    def add(totals: list[Tensor]) -> int:
        totals[0] += (rank + 1) ** 2
        totals[1] += rank + 1
        return rank + 1

    def add_or_fail() -> int:
        if rank == 1:
            raise ValueError("é" * 5000)
        return 1

    def fails_on_two() -> None:
        if rank != 1:
            raise LocalError(f"of rank {rank}")

    def raised(call: Callable[[], Any]) -> list[str]:
        try:
            call()
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    totals = [torch.zeros((), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    return {
        "shared": {
            "number": ranks.all_reduce_sum([2.0**40, 1.0, 2.0][rank]),
            "tensor": ranks.all_reduce_sum(torch.tensor([rank + 1.0, 1.0])).tolist(),
            "mean": [float(t) for t in ranks.all_reduce_mean(totals, lambda: add(totals))],
            "rows": ranks.all_gather(own.expand(rank + 1, 1)).tolist(),
            "objects": ranks.all_gather_object([f"rank {rank}"]),
            "any": [ranks.any(rank == 2), ranks.any(False)],
            "tensor of 2": ranks.broadcast(own, source=2).tolist(),
            "object of 1": ranks.broadcast_object({"rank": rank}, source=1),
        },
        "mean fails": raised(lambda: ranks.all_reduce_mean([own.clone()], add_or_fail)),
        "together fails": raised(lambda: ranks.raise_together(fails_on_two)),
        "needs arguments": raised(
            lambda: ranks.raise_together(lambda: b"\xff".decode() if rank == 2 else "")
        ),
    }
