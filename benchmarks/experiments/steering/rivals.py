"""Rivals of steering: learning rate and batch size chosen without a region."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import stableopt
from benchmarks.experiments.steering.case import REGIONS, Budget, Outcome
from benchmarks.experiments.steering.loop import (
    ended,
    margins_at_end,
    sampler_of,
    train,
    with_batch,
)
from benchmarks.training.data import Images
from benchmarks.training.loops import mean_squared_error
from stableopt import StabilityMargins

__all__ = ["curvature_aware", "fixed", "grid_searched", "noise_scaled", "scratch_constant"]


def fixed(start: nn.Module, images: Images, budget: Budget, seed: int) -> Outcome:
    """Go on with the learning rate and the full batches that led to the minimum."""
    model = copy.deepcopy(start)
    optimizer = stableopt.GD(model.parameters(), lr=budget.lr)
    sampler = sampler_of(images, len(images.x), seed)
    largest = train(model, optimizer, images, sampler, budget.steps)
    return ended("fixed", "none", seed, budget.steps, model, optimizer, images, largest)


def grid_searched(
    start: nn.Module, images: Images, budget: Budget, seed: int, at_start: StabilityMargins
) -> list[Outcome]:
    """Try ramps of the learning rate, and take for each flatter region the one that ended nearest."""
    ends: list[tuple[StabilityMargins, float, float]] = []
    for factor in budget.grid_lrs:
        for ramp in budget.grid_ramps:
            model = copy.deepcopy(start)
            optimizer = stableopt.GD(model.parameters(), lr=budget.lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step, factor=factor, ramp=ramp: factor ** min((step + 1) / ramp, 1.0),
            )
            sampler = sampler_of(images, len(images.x), seed)
            largest = train(model, optimizer, images, sampler, budget.steps, schedule.step)
            end = margins_at_end(model, optimizer, images)
            ends.append((end, images.accuracy(model), largest))
    outcomes = []
    for region in ("1.5x flatter", "2x flatter", "4x flatter"):
        target = REGIONS[region].resolve(at_start)
        aim = target.aim
        assert aim is not None
        best = min(ends, key=lambda each: _miss(each[0], aim))
        outcomes.append(
            Outcome(
                "grid-searched",
                region,
                seed,
                budget.steps * len(ends),
                0,
                best[0],
                best[1],
                best[2],
                target,
            )
        )
    return outcomes


def curvature_aware(
    start: nn.Module, images: Images, budget: Budget, seed: int, scale: float = 2.0
) -> Outcome:
    r"""Set the rate as CDAT does (Roulet et al., "Stepping on the edge", 2024).

    :math:`\eta_t = \sigma\,n_t/d_t` with n and d the running means, at 0.9, of :math:`\|g\|^2` and
    :math:`|g^\top H g|`; σ = 2 is "on the edge".
    """
    model = copy.deepcopy(start)
    optimizer = stableopt.GD(model.parameters(), lr=budget.lr)
    parameters = list(model.parameters())
    numerator = denominator = 0.0
    largest = 0.0
    for _ in range(budget.steps):
        loss = mean_squared_error(model(images.x), images.y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        frozen = [g.detach() for g in gradients]
        along = sum((g * f).sum() for g, f in zip(gradients, frozen, strict=True))
        products = torch.autograd.grad(along, parameters)
        square = float(sum(f.square().sum() for f in frozen))
        curved = float(sum((f * h).sum() for f, h in zip(frozen, products, strict=True)))
        numerator = 0.9 * numerator + 0.1 * square
        denominator = 0.9 * denominator + 0.1 * abs(curved)
        optimizer.param_groups[0]["lr"] = scale * numerator / max(denominator, 1e-30)
        for p, f in zip(parameters, frozen, strict=True):
            p.grad = f
        optimizer.step()
        largest = max(largest, float(loss.detach()))
    outcome = ended("CDAT", "none", seed, budget.steps, model, optimizer, images, largest)
    return Outcome(**{**vars(outcome), "products": budget.steps})


def noise_scaled(start: nn.Module, images: Images, budget: Budget, seed: int) -> Outcome:
    r"""Set the batch size to the simple noise scale (McCandlish et al., 2018), every 50 steps.

    :math:`B = \mathrm{tr}\,\mathrm{Cov}(g_i)/\|\bar g\|^2`, from the gradients of all samples.
    """
    model = copy.deepcopy(start)
    optimizer = stableopt.SGD(model.parameters(), lr=budget.lr)
    sampler = sampler_of(images, budget.batch_size, seed)
    count = 0

    def follow() -> None:
        nonlocal count
        if count % 50 == 0:
            sampler.batch_size = sampler.nearest(max(_noise_scale(model, images), 1.0))
        count += 1

    follow()
    largest = train(model, optimizer, images, sampler, budget.sgd_steps, follow)
    outcome = ended(
        "noise scale", "none", seed, budget.sgd_steps, model, optimizer, images, largest
    )
    return Outcome(**{**vars(outcome), "end": with_batch(outcome.end, sampler.batch_size)})


def scratch_constant(
    model: nn.Module, images: Images, budget: Budget, seed: int, lr: float
) -> Outcome:
    """Train from initialisation at a constant rate."""
    optimizer = stableopt.SGD(model.parameters(), lr=lr)
    sampler = sampler_of(images, 32, seed)
    largest = train(model, optimizer, images, sampler, budget.scratch_steps)
    return ended(
        f"constant {lr:g}",
        "from scratch",
        seed,
        budget.scratch_steps,
        model,
        optimizer,
        images,
        largest,
    )


def _miss(margins: StabilityMargins, aim: float) -> float:
    a = margins.sharpness
    return math.inf if a is None or not a > 0 else abs(math.log(a / aim))


def _noise_scale(model: nn.Module, images: Images) -> float:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mean_squared_error(functional_call(model, parameters, (x,)), y)

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images.x, images.y)
    flat = torch.cat([g.flatten(1) for g in each.values()], dim=1).double()
    mean = flat.mean(0)
    square = float(mean.square().sum())
    return float((flat - mean).square().sum()) / len(flat) / max(square, 1e-300)
