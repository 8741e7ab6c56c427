"""Layers of replicas and of models under ``fully_shard``."""

from __future__ import annotations

from typing import Any

from oracles import small_data
from torch import nn

from rank_workers.fully_sharded import fully_sharded, wide_network
from rank_workers.shares import SAMPLES, own
from stableopt import measure


def measured(model: nn.Module, data: Any) -> dict[str, Any]:
    """Return the layers as plain numbers."""
    margins = measure(model, nn.MSELoss(), data, lr=0.1, quantities=("layers",), tol=1e-6)
    assert margins.layers is not None
    return margins.layers.to_dict()


def layers_of_ranks() -> dict[str, Any]:
    """Measure a replica and a sharded model, each rank with its own samples."""
    data = own(small_data(SAMPLES))
    replica = nn.parallel.DistributedDataParallel(wide_network())
    return {
        "DDP": measured(replica, data),
        "FSDP": measured(fully_sharded(wide_network()), data),
    }
