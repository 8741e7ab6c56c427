"""Optimizers, schedulers and samplers of replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracles import small_data, small_network
from rank_processes import shard
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import stableopt
import stableopt.monitor.schedule
from rank_workers.shares import SAMPLES, own
from stableopt.distributed.collectives import Ranks
from stableopt.steering import rollback


def reduced(loss: Tensor) -> Tensor:
    """Return the mean of the ranks' losses, as DistributedDataParallel takes that of gradients."""
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def quasi_newton() -> dict[str, Any]:
    """Train replicas by L-BFGS, whose line search decides by the losses of all ranks."""
    model = nn.parallel.DistributedDataParallel(small_network())
    optimizer = stableopt.LBFGS(
        model.parameters(), line_search_fn="strong_wolfe", max_iter=25, reduce_loss=reduced
    )
    monitor = optimizer.track(model, nn.MSELoss(), own(small_data(SAMPLES)), every=1)
    x, y = own(small_data(SAMPLES))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [float(closure().detach())]
    for _ in range(2):
        optimizer.step(closure)
    losses.append(float(closure().detach()))
    state = optimizer.state_dict()["state"][0]
    return {
        "losses": losses,
        "weights": [p.tolist() for p in model.parameters()],
        "calls": state["func_evals"],
        "failures": [margins.failure for margins in monitor.history],
    }


def steered() -> dict[str, Any]:
    """Steer rate and batch size of replicas."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1).double())
    x, _ = small_data(64)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())
    sampler = stableopt.AdaptiveBatchSampler(DistributedSampler(data, seed=1), 4, max_batch_size=16)
    loader = DataLoader(data, batch_sampler=sampler)
    optimizer = stableopt.SGD(model.parameters(), lr=0.3)
    part = shard(64, dist.get_rank(), dist.get_world_size())
    monitor = optimizer.track(
        model,
        nn.MSELoss(),
        tuple(t[part] for t in data.tensors),
        every=1,
        quantities=["sharpness", "non_uniformity"],
    )
    # The sharpness is 2.9, the non-uniformity 6.7: a rate of 1/3, and batches of 4 on both ranks.
    target = stableopt.TargetRegion(sharpness=(0, 6.0), non_uniformity=(0, 6.0))
    controller = stableopt.StabilityController(monitor, target, batch=sampler)
    sizes = []
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            controller.step()
            sizes.append(len(inputs))
    return {
        "lr": optimizer.param_groups[0]["lr"],
        "sizes": sizes,
        "observed": monitor.batch_size,
        "weights": [p.tolist() for p in model.parameters()],
        "changes": [[d.what, d.kind, d.new] for d in controller.decisions if d.changes],
    }


def steered_seldom() -> dict[str, Any]:
    """Steer replicas that are measured at every fifth step, and count the broadcasts."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3).double())
    x, y = own(small_data(SAMPLES))
    optimizer = stableopt.SGD(model.parameters(), lr=0.05)
    monitor = optimizer.track(model, nn.MSELoss(), (x, y), every=5)
    controller = stableopt.StabilityController(monitor, stableopt.TargetRegion.flatter(by=2))
    broadcast_at = []
    broadcast_object = Ranks.broadcast_object

    def counted(ranks: Ranks, sent: Any, source: int = 0) -> Any:
        broadcast_at.append(monitor.step)
        return broadcast_object(ranks, sent, source)

    with mock.patch.object(Ranks, "broadcast_object", counted):
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            controller.step()
    return {
        "broadcast at": broadcast_at,
        "state": controller.state_dict(),
        "target": [controller.target.unit, controller.scheduler.target.unit],
    }


def steps_with_a_spike(
    steps: int, model: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[None]:
    """Train, and yield after each step; the gradient of the sixth is 10,000 times too large."""
    x, y = data
    for step in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        (loss * 1e4 if step == 5 else loss).backward()
        optimizer.step()
        yield


def measured_apart() -> dict[str, Any]:
    """Steer replicas whose monitors measure a rank's own samples, each on a schedule of its own."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3).double())
    x, y = own(small_data(SAMPLES))
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    every = [3, 2][dist.get_rank()]
    monitor = optimizer.track(model.module, nn.MSELoss(), (x, y), every=every)
    target = stableopt.TargetRegion(sharpness=(0, 20.0))
    controller = stableopt.StabilityController(monitor, target, lr={"loss_cap": 50.0})
    for _ in steps_with_a_spike(12, model, (x, y), optimizer):
        controller.step()
    return {
        "state": controller.state_dict(),
        "weights": [p.tolist() for p in model.parameters()],
        "momentum": [optimizer.state[p]["momentum_buffer"].tolist() for p in model.parameters()],
        "steps": [d.step for d in controller.decisions],
        "kinds": [d.kind for d in controller.decisions],
    }


def restored() -> dict[str, Any]:
    """Let replicas with momentum diverge once, and train on after the weights were restored."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3).double())
    x, y = own(small_data(SAMPLES))
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = optimizer.track(model, nn.MSELoss(), (x, y), every=1)
    target = stableopt.TargetRegion(sharpness=(0, 20.0))
    scheduler = stableopt.StabilityLR(optimizer, monitor, target, loss_cap=50.0)
    weights, momentum = [], []
    for _ in steps_with_a_spike(8, model, (x, y), optimizer):
        scheduler.step()
        weights.append([p.tolist() for p in model.parameters()])
        buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        momentum.append([buffer.tolist() for buffer in buffers])
    return {
        "weights": weights,
        "momentum": momentum,
        "kinds": [d.kind for d in scheduler.decisions],
    }


def failing() -> dict[str, str]:
    """Steer replicas by a law that raises, and kick them along a direction that cannot be found."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3).double())
    data = own(small_data(SAMPLES))
    optimizer = stableopt.SGD(model.parameters(), lr=0.05)
    monitor = optimizer.track(model, nn.MSELoss(), data, every=1)
    no = mock.Mock(side_effect=ValueError("no"))
    target = stableopt.TargetRegion(sharpness=(0, 20.0))
    scheduler = stableopt.StabilityLR(optimizer, monitor, target, law=no)
    errors = {}
    for _ in steps_with_a_spike(1, model, data, optimizer):
        errors["law"] = caught(scheduler.step)
    with mock.patch.object(rollback, "_least_stable_direction", no):
        errors["kick"] = caught(lambda: rollback.kick(monitor, 0.1))
    return errors


def caught(action: Callable[[], object]) -> str:
    """Return the error of ``action`` in words."""
    with pytest.raises(Exception) as error:  # noqa: PT011
        action()
    return f"{error.type.__name__}: {error.value}"
