"""Monitors of replicas, and what happens where one rank fails or is lost."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from oracles import small_data, small_network
from torch import Tensor, nn

import stableopt
import stableopt.monitor.schedule
from rank_workers.shares import SAMPLES, group, own
from stableopt import Problem, measure
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.stability import Quantity, QuantityResult, register
from stableopt.stability.measure.evaluation import Evaluation


class Steps:
    """A clock that advances by its speed at each reading; ranks have different speeds."""

    def __init__(self, speed: float) -> None:
        self.now, self.speed = 0.0, speed

    def perf_counter(self) -> float:
        self.now += self.speed
        return self.now


def trained(steps: int, *, track: bool, **options: Any) -> tuple[nn.Module, Any, list[int]]:
    """Train replicas on their own batches; return model, monitor, and what its sink received."""
    rank, received = dist.get_rank(), []
    model = nn.parallel.DistributedDataParallel(small_network())
    optimizer = stableopt.SGD(model.parameters(), lr=0.2, momentum=0.5)
    monitor = None
    if track:
        options = {"quantities": ["sharpness", "non_uniformity"], "tol": 1e-9, **options}
        monitor = optimizer.track(
            model,
            nn.MSELoss(),
            own(small_data(SAMPLES)),
            sinks=[lambda step, record: received.append(step)],
            **options,
        )
    x, y = small_data(40)
    for step in range(steps):
        part = slice(step, step + 2 + rank)  # batches are as unequal as the shards
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return model, monitor, received


def tracking() -> dict[str, Any]:
    """Track replicas; return the margins, and whether training was unchanged."""
    model, monitor, received = trained(6, track=True, every=2)
    untracked, _, _ = trained(6, track=False)
    same = zip(model.parameters(), untracked.parameters(), strict=True)
    return {
        "weights": [p.tolist() for p in model.parameters()],
        "untouched": all(torch.equal(a, b) for a, b in same),
        "steps": [margins.step for margins in monitor.history],
        "received": received,
        "failures": [margins.failure for margins in monitor.history],
        "sharpness": monitor.margins.sharpness,
        "non_uniformity": monitor.margins.non_uniformity,
        "limit": monitor.margins.non_uniformity_limit,
        "batch": monitor.batch_size,
        "samples": monitor.margins.dataset_size,
    }


def counted() -> int | None:
    """Return the batch size of a time-first batch loss, where one rank has a single sample to probe."""
    model, rank = small_network(), dist.get_rank()
    x = small_data(SAMPLES)[0]

    def loss(model: nn.Module, samples: Tensor) -> Tensor:
        return model(torch.stack([samples, -samples])).square().mean()

    problem = Problem.from_batch_loss(model, loss, x[:1] if rank else x[1:6], process_group=group())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stableopt.StabilityMonitor(optimizer, problem, every=1) as monitor:
        loss(model, x[:3]).backward()  # the same batch on all ranks, whose weights stay equal
        optimizer.step()
    size: int | None = monitor.batch_size
    return size


def clocks() -> list[int]:
    """Measure by the clock, where each rank has another; return the steps that were measured."""
    stableopt.monitor.schedule.time = Steps([1.0, 1000.0][dist.get_rank()])  # type: ignore[assignment]
    options = {"max_overhead": 0.2, "quantities": ["sharpness"], "tol": 0.1}
    _, monitor, _ = trained(24, track=True, **options)
    return [margins.step for margins in monitor.history]


def failing() -> dict[str, Any]:
    """Fail on rank 1 alone, in several ways; return what each rank records."""
    rank, data = dist.get_rank(), own(small_data(SAMPLES))
    broken = {"now": False}

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if broken["now"] and rank == 1:
            raise KeyError("sample 5")
        return nn.functional.mse_loss(outputs, targets)

    found: dict[str, Any] = {}
    model = nn.parallel.DistributedDataParallel(small_network())
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, loss_fn, data, every=1)
    for name in ("before", "broken", "after"):
        broken["now"] = name == "broken"
        optimizer.zero_grad()
        model(data[0]).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found[name] = monitor.margins.failure
        found[f"{name} warned"] = len(caught)
    x, y = data[0], data[1].clone()
    y[0] = float("nan") if rank == 1 else y[0]
    found["nan"] = measure(small_network(), nn.MSELoss(), (x, y), process_group=group()).failure

    def refused(*args: Any, **options: Any) -> str:
        try:
            Problem(*args, process_group=group(), **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    empty = (x[:0], y[:0]) if rank == 1 else data
    found["empty"] = refused(small_network(), nn.MSELoss(), empty)
    other = small_network()
    if rank == 1:
        nn.init.normal_(other[0].weight)
    found["other weights"] = refused(other, nn.MSELoss(), data)
    found["ranks still agree"] = Problem(
        small_network(), nn.MSELoss(), data, process_group=group()
    ).num_samples
    return found


def isolated() -> dict[str, Any]:
    """Measure quantities that fail on one rank, or on all; return what each rank has of each."""
    rank = dist.get_rank()

    def between(at: Evaluation) -> QuantityResult:
        """Fail on one rank, while the others wait in a collective of another shape."""
        if rank == 1:
            raise MemoryError("out of memory")
        at.problem.gradient()
        return QuantityResult(float(at.problem.ranks.all_gather_object(rank)[0]))

    def within(at: Evaluation) -> QuantityResult:
        """Fail on one rank in a loop over chunks."""

        def add(batch: Any, size: int) -> None:
            if rank == 1:
                raise KeyError("sample 5")

        mean_over_chunks(at.problem, [torch.zeros(1)], add, at.problem.chunks())
        return QuantityResult(0.0)

    def at_the_end(at: Evaluation) -> QuantityResult:
        """Fail on the last rank when the others have finished."""
        if rank == dist.get_world_size() - 1:
            raise ZeroDivisionError("no noise")
        return QuantityResult(0.0)

    def on_all(at: Evaluation) -> QuantityResult:
        raise ValueError("undefined")

    toys = {"between": between, "within": within, "at_the_end": at_the_end, "on_all": on_all}
    for name, function in toys.items():
        register(Quantity(name, function))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        margins = measure(
            small_network(),
            nn.MSELoss(),
            own(small_data(SAMPLES)),
            quantities=[*toys, "sharpness", "non_uniformity"],
            tol=1e-9,
            max_iter=300,
            process_group=group(),
        )
    return {
        "failures": margins.failures,
        "sharpness": margins.sharpness,
        "non_uniformity": margins.non_uniformity,
    }


def losing(how: str) -> dict[str, Any]:
    """Lose rank 1 in the middle of a measurement; return the other's error and its time."""
    rank, data, calls = dist.get_rank(), own(small_data(SAMPLES)), [0]

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if rank == 1 and calls[0] == lost_at:
            if how == "dies":
                os._exit(1)
            time.sleep(6)
        return nn.functional.mse_loss(outputs, targets)

    lost_at = -1
    model = nn.parallel.DistributedDataParallel(small_network())
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    monitor = optimizer.track(model, loss_fn, data, every=1, chunk_size=2)
    lost_at = calls[0] + 2
    nn.functional.mse_loss(model(data[0]), data[1]).backward()
    began = time.monotonic()
    try:
        optimizer.step()
    except Exception as error:
        seconds = time.monotonic() - began
        return {"error": type(error).__name__, "message": str(error), "seconds": seconds}
    return {"error": None, "history": len(monitor.history)}


def closed() -> dict[str, Any]:
    """Train on after a sink has closed the monitor; return its last step, and whether it is closed."""
    x, y = own(small_data(SAMPLES))
    found = {}
    for kind in ("measured", "decided"):
        model = nn.parallel.DistributedDataParallel(small_network())
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        monitor = optimizer.track(model, nn.MSELoss(), (x, y), every=1)

        def close(step: int, record: Any, kind: str = kind, monitor: Any = monitor) -> None:
            if (step == 2 and kind == "measured") or "decision" in record:
                monitor.close()

        monitor.sinks.append(close)
        target = stableopt.TargetRegion(sharpness=(0, 1000.0))
        scheduler = stableopt.StabilityLR(optimizer, monitor, target, max_lr=0.2)
        for step in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            if kind == "decided" and step >= 2:
                scheduler.step()
        found[kind] = [monitor.step, monitor.closed]
    return found
