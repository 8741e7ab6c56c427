"""Steering to a region: from gradient descent's minimum, and from scratch."""

from __future__ import annotations

import copy
import math

from torch import nn

import stableopt
from benchmarks.experiments.steering.case import REGIONS, Budget, Outcome
from benchmarks.experiments.steering.loop import ended, sampler_of, train
from benchmarks.training.data import Images
from benchmarks.training.loops import evaluate, mean_squared_error
from stableopt import StabilityController, TargetRegion

__all__ = ["scratch_steered", "steered"]

_BOTH = ("sharpness", "non_uniformity")


def steered(
    start: nn.Module, images: Images, budget: Budget, region: str, seed: int, loss_cap: float
) -> Outcome:
    """Steer towards ``region``: full batches if it bounds only the sharpness."""
    target = REGIONS[region]
    noisy = target.non_uniformity != (0.0, math.inf)
    model = copy.deepcopy(start)
    optimizer = (stableopt.SGD if noisy else stableopt.GD)(model.parameters(), lr=budget.lr)
    sampler = sampler_of(images, budget.batch_size if noisy else len(images.x), seed)
    with optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=budget.measure_every * (5 if noisy else 1),
        quantities=_BOTH if noisy else ("sharpness",),
    ) as monitor:
        monitor.measure()
        options = {"loss_cap": loss_cap} if target.sharpness != (0.0, math.inf) else False
        controller = StabilityController(
            monitor, target, lr=options, batch=sampler if noisy else None
        )
        steps = budget.sgd_steps if noisy else budget.steps
        train(model, optimizer, images, sampler, steps, controller.step)
    return ended("steered", region, seed, steps, model, optimizer, images, controller=controller)


def scratch_steered(model: nn.Module, images: Images, budget: Budget, seed: int) -> Outcome:
    """Train from initialisation; the user names the region and nothing else."""
    target = TargetRegion(sharpness=(0, budget.scratch_sharpness))
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    sampler = sampler_of(images, 32, seed)
    with optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=budget.measure_every,
    ) as monitor:
        controller = StabilityController(
            monitor, target, lr={"loss_cap": 1.5 * evaluate(model, images)}
        )
        train(model, optimizer, images, sampler, budget.scratch_steps, controller.step)
    return ended(
        "steered",
        "from scratch",
        seed,
        budget.scratch_steps,
        model,
        optimizer,
        images,
        controller=controller,
    )
