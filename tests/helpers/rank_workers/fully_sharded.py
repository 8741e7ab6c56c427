"""Measurements and training of models under ``fully_shard``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from oracles import small_data
from rank_processes import shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stableopt
import stableopt.monitor.schedule
from rank_workers.shares import SAMPLES, own
from stableopt import Problem, measure
from stableopt.curvature.problem.sharded import ShardedProblem
from stableopt.curvature.products.sharded_hessian import ShardedHessian


def wide_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a network of 83 parameters; no layer divides evenly among ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    ).to(dtype)


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(vector: Tensor, problem: Any) -> list[float]:
    """Return the flat vector of all parameters, from the shards that the ranks hold."""
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
    """Measure sharded models; return the margins, and whether anything was changed."""
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


CLASSES = torch.tensor([1.0, 7.0, 0.3], dtype=torch.float64)


def labelled() -> tuple[Tensor, Tensor]:
    """Return inputs and two targets for each; all first targets of the first samples are ignored."""
    x, _ = small_data(SAMPLES)
    labels = torch.arange(SAMPLES) % 3
    labels[:5] = -100
    return x, torch.stack([labels, torch.arange(SAMPLES) // 6], 1)


def of_classes(outputs: Tensor, y: Tensor) -> Tensor:
    """Return a sum of two means with weights of their own."""
    cross_entropy = nn.functional.cross_entropy
    return cross_entropy(outputs, y[:, 0]) + cross_entropy(outputs, y[:, 1], CLASSES)


def divided_by_own_weights(outputs: Tensor, y: Tensor) -> Tensor:
    """Return a mean that torch's losses do not show."""
    weight = CLASSES[y[:, 1]]
    losses = nn.functional.cross_entropy(outputs, y[:, 1], reduction="none")
    return (weight * losses).sum() / weight.sum()


def weight_of(batch: Any) -> Tensor:
    return CLASSES[batch[1][:, 1]]


def fsdp_weighted(chunk_size: int | None) -> dict[str, Any]:
    """Take gradients and products of losses that weigh samples."""
    data, found = own(labelled()), {}
    weights = weight_of(labelled())
    rank, size = dist.get_rank(), dist.get_world_size()
    cases: dict[str, tuple[Any, Any]] = {
        "of torch": (of_classes, None),
        "a function": (divided_by_own_weights, weight_of),
        "a tensor": (divided_by_own_weights, weights[shard(SAMPLES, rank, size)]),
    }
    for name, (loss, sample_weight) in cases.items():
        problem = ShardedProblem(
            fully_sharded(wide_network()),
            loss,
            data,
            chunk_size=chunk_size,
            sample_weight=sample_weight,
        )
        vector = torch.cat([p.to_local().reshape(-1) for p in problem.params]).detach()
        found[f"{name} vector"] = whole(vector, problem)
        found[f"{name} product"] = whole(ShardedHessian(problem) @ vector, problem)
        found[f"{name} gradient"] = whole(problem.gradient(), problem)
        found[f"{name} value"] = problem.value()
    return found


def unsure() -> dict[str, Any]:
    """Take products whose differences are not derivatives, or whose batches are dictionaries."""
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


def fsdp_counted() -> dict[str, int | None]:
    """Return the batch sizes that a monitor observes: for a loss that passes each sample twice, and
    where the loop counts them.
    """
    model, (x, _) = fully_sharded(wide_network()), own(small_data(SAMPLES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - model(-x)).square().mean()

    problem, found = ShardedProblem.from_batch_loss(model, loss, x, chunk_size=2), {}
    with stableopt.StabilityMonitor(optimizer, problem, every=1) as monitor:
        for name in ("observed", "counted"):
            if name == "counted":
                monitor.count_samples(x[:3])
            loss(model, x[:3]).backward()
            optimizer.step()
            found[name] = monitor.batch_size
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
    labels = own(labelled())
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
    for name, weight in {
        "unknown weights": None,
        "wrong weights": lambda batch: weight_of(batch).square(),
        "negative weights": lambda batch: -weight_of(batch),
    }.items():
        try:
            measure(
                fully_sharded(wide_network()), divided_by_own_weights, labels, sample_weight=weight
            )
        except ValueError as error:
            found[name] = str(error)
    try:
        Problem(fully_sharded(wide_network()), nn.MSELoss(), data)
    except TypeError as error:
        found["problem"] = str(error)
    return found
