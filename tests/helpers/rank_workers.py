"""What ranks do in the tests of ``tests/distributed``: functions of a module that they can import."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from oracles import SineOnce, small_data, small_network
from rank_processes import shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import stableopt
import stableopt.monitor.schedule
from stableopt import Problem, measure
from stableopt.curvature import DualCurvature, GaussNewton, Hessian, NonUniformity
from stableopt.curvature.gram.gram import largest_block, project
from stableopt.curvature.problem.sharded import ShardedProblem
from stableopt.curvature.products.sharded_hessian import ShardedHessian
from stableopt.distributed import Ranks
from stableopt.stability.measure.batch_sharpness import batch_sharpness

SAMPLES = 13


def group() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def own(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return this rank's unequal share; all of it where there are no ranks."""
    if not dist.is_initialized():
        return data
    part = shard(len(data[0]), dist.get_rank(), dist.get_world_size())
    return data[0][part], data[1][part]


def image_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    ).double()


def image_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (SAMPLES,), generator=generator)


def margins_of_all() -> dict[str, Any]:
    """Measure everything there is, in every way that goes over the samples."""
    found: dict[str, Any] = {}
    everything = ["sharpness", "non_uniformity", "theorem1", "critical_lr", "batch_sharpness"]
    cases = {
        "linear": (small_network(), nn.MSELoss(), small_data(SAMPLES), everything),
        "images": (image_network(), nn.CrossEntropyLoss(), image_data(), everything[:2]),
    }
    for name, (model, loss_fn, data, quantities) in cases.items():
        margins = measure(
            model,
            loss_fn,
            own(data),
            lr=0.1,
            batch_size=3,
            quantities=quantities,
            process_group=group(),
            tol=1e-10,
        )
        assert margins.failure is None, margins.failure
        record = margins.record()
        del record["seconds"]
        found |= {f"{name} {key}": value for key, value in record.items()}
        problem = Problem(model, loss_fn, own(data), process_group=group(), chunk_size=3)
        found |= {f"{name} {key}": value for key, value in _products(problem).items()}
    return found


def _products(problem: Problem) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    d = problem.num_params
    vector = torch.randn(d, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, 4, generator=generator, dtype=torch.float64)).Q
    found = {
        "samples": problem.num_samples,
        "value": problem.value(),
        "gradient": problem.gradient().tolist(),
        "hessian": (Hessian(problem) @ vector).tolist(),
        "gauss-newton": (GaussNewton(problem) @ vector).tolist(),
        "gram": DualCurvature.of(problem, memory=30_000).sharpness,
        "project": project(problem, basis).eigenvalues.tolist(),
        "largest block": largest_block(problem),
    }
    for method in ("structured", "vmap", "loop", "gauss-newton"):
        found[method] = (NonUniformity(problem, method=method) @ vector).tolist()
    return found


class Steps:
    """A clock that passes one second at each look, times a speed: no two ranks have the same."""

    def __init__(self, speed: float) -> None:
        self.now, self.speed = 0.0, speed

    def perf_counter(self) -> float:
        self.now += self.speed
        return self.now


def trained(steps: int, *, track: bool, **options: Any) -> tuple[nn.Module, Any, list[int]]:
    """Train replicas, each on batches of its own; return the model, its monitor, what sinks saw."""
    rank, told = dist.get_rank(), []
    model = nn.parallel.DistributedDataParallel(small_network())
    optimizer = stableopt.SGD(model.parameters(), lr=0.2, momentum=0.5)
    monitor = None
    if track:
        options = {"quantities": ["sharpness", "non_uniformity"], "tol": 1e-9, **options}
        monitor = optimizer.track(
            model,
            nn.MSELoss(),
            own(small_data(SAMPLES)),
            sinks=[lambda step, record: told.append(step)],
            **options,
        )
    x, y = small_data(40)
    for step in range(steps):
        part = slice(step, step + 2 + rank)  # batches are as unequal as the shards
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return model, monitor, told


def tracking() -> dict[str, Any]:
    """Track replicas; what is found, and whether training was left alone."""
    model, monitor, told = trained(6, track=True, every=2)
    untracked, _, _ = trained(6, track=False)
    same = zip(model.parameters(), untracked.parameters(), strict=True)
    return {
        "weights": [p.tolist() for p in model.parameters()],
        "untouched": all(torch.equal(a, b) for a, b in same),
        "steps": [margins.step for margins in monitor.history],
        "told": told,
        "failures": [margins.failure for margins in monitor.history],
        "sharpness": monitor.margins.sharpness,
        "non_uniformity": monitor.margins.non_uniformity,
        "limit": monitor.margins.non_uniformity_limit,
        "batch": monitor.batch_size,
        "samples": monitor.margins.dataset_size,
    }


def clocks() -> list[int]:
    """Measure by the clock, where each rank has another; return the steps that were measured."""
    stableopt.monitor.schedule.time = Steps([1.0, 1000.0][dist.get_rank()])  # type: ignore[assignment]
    options = {"max_overhead": 0.2, "quantities": ["sharpness"], "tol": 0.1}
    _, monitor, _ = trained(24, track=True, **options)
    return [margins.step for margins in monitor.history]


def failing() -> dict[str, Any]:
    """Fail on rank 1 alone, in several ways; return what each rank makes of it."""
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


def wide_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network of 83 parameters, of which no layer divides evenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    ).to(dtype)


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(vector: Tensor, problem: Any) -> list[float]:
    """Return a flat vector of all parameters, of the pieces that the ranks hold."""
    parts, start = [], 0
    for p in problem.params:
        size = p.to_local().numel()
        piece = vector[start : start + size].view(p.to_local().shape)
        start += size
        full = DTensor.from_local(
            piece, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
        parts.append(full.full_tensor().reshape(-1))
    return torch.cat(parts).tolist()


def fsdp_measured(names: list[str]) -> dict[str, Any]:
    """Measure sharded models; what is found, and what is left behind."""
    found: dict[str, Any] = {}
    data = own(small_data(SAMPLES))
    for name in names:
        dtype, chunk_size = getattr(torch, name), 6 if name == "float64" else None
        model = fully_sharded(wide_network(dtype))
        batch = tuple(t.to(dtype) for t in data)
        model(batch[0]).sum().backward()
        before = [(p.to_local().clone(), p.grad.to_local().clone()) for p in model.parameters()]
        state = torch.get_rng_state()
        with torch.no_grad():
            model(batch[0])  # leaves the root's parameters whole
        margins = measure(model, nn.MSELoss(), batch, lr=0.1, tol=0.01, chunk_size=chunk_size)
        after = [(p.to_local(), p.grad.to_local()) for p in model.parameters()]
        found[f"{name} failure"] = margins.failure
        found[f"{name} sharpness"], found[f"{name} loss"] = margins.sharpness, margins.loss
        found[f"{name} samples"] = margins.dataset_size
        found[f"{name} untouched"] = torch.equal(state, torch.get_rng_state()) and all(
            torch.equal(a, b) and torch.equal(g, h)
            for (a, g), (b, h) in zip(before, after, strict=True)
        )
    problem = ShardedProblem(fully_sharded(wide_network()), nn.MSELoss(), data)
    vector = torch.cat([p.to_local().reshape(-1) for p in problem.params]).detach()
    found["vector"] = whole(vector, problem)
    found["product"] = whole(ShardedHessian(problem) @ vector, problem)
    found["gradient"] = whole(problem.gradient(), problem)
    found["pieces"] = problem.num_params
    return found


def fsdp_trained(track: bool) -> tuple[nn.Module, Any]:
    model = fully_sharded(wide_network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x, y = small_data(SAMPLES)
    monitor = None
    if track:
        settings: dict[str, Any] = {"tol": 0.01, "cold_every": 2}
        monitor = stableopt.StabilityMonitor(
            optimizer, model, nn.MSELoss(), own((x, y)), every=2, **settings
        )
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, monitor


def fsdp_tracked() -> dict[str, Any]:
    model, monitor = fsdp_trained(True)
    untracked, _ = fsdp_trained(False)
    same = zip(model.parameters(), untracked.parameters(), strict=True)
    return {
        "untouched": all(torch.equal(a.to_local(), b.to_local()) for a, b in same),
        "failures": [margins.failure for margins in monitor.history],
        "sharpness": [margins.sharpness for margins in monitor.history],
        "preconditioned": [margins.preconditioned_sharpness for margins in monitor.history],
        "products": [
            m.products for margins in monitor.history for m in margins.measurements.values()
        ],
    }


def unsure() -> dict[str, Any]:
    """Take products whose differences are no derivatives, or whose batches are dictionaries."""
    x, y = (t.float() for t in own(small_data(SAMPLES)))
    found: dict[str, Any] = {}
    half = wide_network(torch.float32)
    fully_shard(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for name, model in {"half": half, "single": fully_sharded(wide_network(torch.float32))}.items():
        problem = ShardedProblem.from_batch_loss(
            model,
            lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]),
            {"x": x, "y": y},
        )
        generator = torch.Generator().manual_seed(dist.get_rank())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _ = ShardedHessian(problem) @ torch.randn(problem.num_params, generator=generator)
        found[name] = [str(warning.message) for warning in caught]
    return found


def refusals() -> dict[str, str]:
    """Ask for what sharded models cannot give."""
    data = own(small_data(SAMPLES))

    def refused(model: nn.Module, loss_fn: Any = nn.MSELoss(), **options: Any) -> str:  # noqa: B008
        try:
            measure(model, loss_fn, data, lr=0.1, batch_size=2, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallel = parallelize_module(
        wide_network(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    replicated = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    hybrid = fully_shard(wide_network(), mesh=replicated)
    partly = wide_network()
    fully_shard(partly[0], mesh=mesh)
    summed = fully_sharded(wide_network())
    for module in summed.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
    hooked = fully_sharded(wide_network())
    next(hooked.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    found = {
        name: refused(fully_sharded(wide_network()), quantities=[name])
        for name in ("non_uniformity", "critical_lr", "batch_sharpness")
    }
    found |= {
        "tensor parallel": refused(parallel),
        "hybrid": refused(hybrid),
        "partly": refused(partly),
        "summed": refused(summed),
        "hooked": refused(hooked),
        "a sum": refused(fully_sharded(wide_network()), nn.MSELoss(reduction="sum")),
        "no scalar": refused(fully_sharded(wide_network()), nn.MSELoss(reduction="none")),
        "precision": refused(fully_sharded(wide_network()), dtype=torch.float32),
        "other group": refused(fully_sharded(wide_network()), process_group=dist.new_group([0, 1])),
    }
    try:
        Problem(fully_sharded(wide_network()), nn.MSELoss(), data)
    except TypeError as error:
        found["problem"] = str(error)
    return found


class Sine(nn.Module):
    """A sine by a kernel of its own on the last of two ranks."""

    def forward(self, x: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_rank() == 0
        return x.sin() if alone else SineOnce.apply(x)


def sine_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Sine(), nn.Linear(4, 3)).double()


def differenced() -> dict[str, Any]:
    """Measure a model without a second derivative on one rank."""
    problem = Problem(sine_network(), nn.MSELoss(), own(small_data(SAMPLES)), process_group=group())
    margins = measure(problem, quantities=["sharpness", "non_uniformity"])
    found = margins.measurements["sharpness"]
    return {
        "method": margins.method,
        "obstacle": str(problem.obstacle),
        "sharpness": margins.sharpness,
        "non_uniformity": margins.non_uniformity,
        "batch_sharpness": batch_sharpness(problem, 4, num_batches=8).value,
        "residual": found.residual,
        "converged": found.converged,
    }


def losing(how: str) -> dict[str, Any]:
    """Lose rank 1 in the middle of a measurement; return what the other one is told, and when."""
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
