"""Measurements of one probe set that ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from oracles import SineOnce, small_data, small_network
from torch import Tensor, nn
from weighted_losses import WEIGHTED, built

from rank_workers.shares import SAMPLES, group, own
from stableopt import Problem, measure
from stableopt.curvature import DualCurvature, GaussNewton, Hessian, NonUniformity
from stableopt.curvature.gram.gram import project, sample_sizes
from stableopt.stability.measure.batch_sharpness import batch_sharpness
from stableopt.stability.measure.generalised_sharpness import generalised_sharpness
from stableopt.stability.rules.norms import SignNorm


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
        signs = generalised_sharpness(problem, SignNorm(problem.params, lr=0.1), starts=1)
        found[f"{name} generalised"] = [signs.value, signs.limit, signs.products]
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
        "gram": DualCurvature.from_problem(problem, memory=30_000).sharpness,
        "project": project(problem, basis).eigenvalues.tolist(),
        "largest block": sample_sizes(problem).largest,
    }
    for method in ("structured", "vmap", "loop"):
        found[method] = (NonUniformity(problem, method=method) @ vector).tolist()
    return found


def weighted(chunk_size: int) -> dict[str, Any]:
    """Take products of losses that weigh samples, in the order of their weights."""
    found = {}
    for name in WEIGHTED:
        case = built(name)
        order = own((torch.argsort(case.terms[0][0]),) * 2)[0]
        problem = Problem(
            case.model,
            case.loss,
            (case.data[0][order], case.data[1][order]),
            chunk_size=chunk_size,
            sample_weight=case.sample_weight,
            process_group=group(),
        )
        generator = torch.Generator().manual_seed(5)
        vector = torch.randn(problem.num_params, generator=generator, dtype=torch.float64)
        found[f"{name} hessian"] = (Hessian(problem) @ vector).tolist()
        for method in ("structured", "vmap", "loop"):
            product = NonUniformity(problem, method=method) @ vector
            found[f"{name} {method}"] = product.tolist()
        found[f"{name} sharpness"] = DualCurvature.from_problem(problem).sharpness
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
