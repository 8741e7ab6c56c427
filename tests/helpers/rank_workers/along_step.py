"""Margins along steps of replicas and of models under ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
from oracles import small_data
from torch import nn
from torch.distributed.tensor import DTensor

from rank_workers.fully_sharded import fully_sharded, wide_network
from rank_workers.shares import SAMPLES, own
from stableopt import StabilityMonitor, critical_sharpness

BOTH = ("realised_edge", "critical_sharpness")


def stepped(model: nn.Module, data: Any, *, watch: bool = True) -> tuple[Any, Any]:
    """Train with clipped gradients, accumulated over two batches; return monitor and optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    monitor = None
    if watch:
        options: dict[str, Any] = {"every": 2, "quantities": BOTH, "realised_window": 1}
        monitor = StabilityMonitor(
            optimizer, model, nn.MSELoss(), data, dataset_size=1000, **options
        )
    x, y = small_data(SAMPLES)
    for _ in range(4):
        optimizer.zero_grad()
        for part in (slice(None), slice(0, 4)):
            nn.functional.mse_loss(model(x[part]), y[part]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return monitor, optimizer


def _local(p: Any) -> torch.Tensor:
    return (p.to_local() if isinstance(p, DTensor) else p).detach().clone()


def along_steps(sharded: bool) -> dict[str, Any]:
    """Measure along the steps of two ranks; return the margins, and whether training changed."""

    def made() -> nn.Module:
        model = wide_network()
        return fully_sharded(model) if sharded else nn.parallel.DistributedDataParallel(model)

    data = own(small_data(SAMPLES))
    model, plain = made(), made()
    monitor, optimizer = stepped(model, data)
    stepped(plain, data, watch=False)
    untouched = [
        torch.equal(_local(p), _local(q))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    before = [_local(p) for p in model.parameters()]
    states = [_local(s) for state in optimizer.state.values() for s in state.values()]
    group = None if sharded else torch.distributed.group.WORLD
    found = critical_sharpness(model, nn.MSELoss(), data, optimizer=optimizer, process_group=group)
    after = [_local(s) for state in optimizer.state.values() for s in state.values()]
    untouched += [
        torch.equal(b, _local(p)) for b, p in zip(before, model.parameters(), strict=True)
    ]
    untouched += [torch.equal(b, a) for b, a in zip(states, after, strict=True)]
    return {
        "untouched": all(untouched),
        "failures": [(m.failure, m.failures) for m in monitor.history],
        "method": monitor.margins.method,
        "realised": [m.realised_edge for m in monitor.history],
        "critical": [m.critical_sharpness for m in monitor.history],
        "next": found.value,
        "passes": found.passes,
    }
