"""What may choose the learning rate and the batch size: steering, and what it is compared with."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import RandomSampler

import stableopt
from benchmarks.data import Images
from benchmarks.steering_case import REGIONS, Config, Outcome
from benchmarks.training import evaluate, mean_squared_error
from stableopt import AdaptiveBatchSampler, StabilityController, StabilityMargins, TargetRegion

__all__ = [
    "curvature_aware",
    "fixed",
    "grid_searched",
    "noise_scaled",
    "scratch_constant",
    "scratch_steered",
    "steered",
]

_BOTH = ("sharpness", "non_uniformity")


def steered(
    start: nn.Module, images: Images, config: Config, region: str, seed: int, loss_cap: float
) -> Outcome:
    """Steer towards ``region``: full batches if it bounds only the sharpness."""
    target = REGIONS[region]
    noisy = target.non_uniformity != (0.0, math.inf)
    model = copy.deepcopy(start)
    optimizer = (stableopt.SGD if noisy else stableopt.GD)(model.parameters(), lr=config.lr)
    sampler = _sampler(images, config.batch_size if noisy else len(images.x), seed)
    with optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=config.measure_every * (5 if noisy else 1),
        quantities=_BOTH if noisy else ("sharpness",),
    ) as monitor:
        monitor.measure()
        options = {"loss_cap": loss_cap} if target.sharpness != (0.0, math.inf) else False
        controller = StabilityController(
            monitor, target, lr=options, batch=sampler if noisy else None
        )
        steps = config.sgd_steps if noisy else config.steps
        _train(model, optimizer, images, sampler, steps, controller.step)
    return _outcome("steered", region, seed, steps, model, optimizer, images, controller=controller)


def fixed(start: nn.Module, images: Images, config: Config, seed: int) -> Outcome:
    """Go on with the learning rate and the full batches that led to the minimum."""
    model = copy.deepcopy(start)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    sampler = _sampler(images, len(images.x), seed)
    largest = _train(model, optimizer, images, sampler, config.steps)
    return _outcome("fixed", "none", seed, config.steps, model, optimizer, images, largest)


def grid_searched(
    start: nn.Module, images: Images, config: Config, seed: int, at_start: StabilityMargins
) -> list[Outcome]:
    """Try ramps of the learning rate, and take for each flatter region the one that ended nearest."""
    ends: list[tuple[StabilityMargins, float, float]] = []
    for factor in config.grid_lrs:
        for ramp in config.grid_ramps:
            model = copy.deepcopy(start)
            optimizer = stableopt.GD(model.parameters(), lr=config.lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step, factor=factor, ramp=ramp: factor ** min((step + 1) / ramp, 1.0),
            )
            sampler = _sampler(images, len(images.x), seed)
            largest = _train(model, optimizer, images, sampler, config.steps, schedule.step)
            end = _end(model, optimizer, images)
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
                config.steps * len(ends),
                0,
                best[0],
                best[1],
                best[2],
                target,
            )
        )
    return outcomes


def curvature_aware(
    start: nn.Module, images: Images, config: Config, seed: int, scale: float = 2.0
) -> Outcome:
    r"""Set the rate as CDAT does (Roulet et al., "Stepping on the edge", 2024).

    :math:`\eta_t = \sigma\,n_t/d_t` with n and d the running means, at 0.9, of :math:`\|g\|^2` and
    :math:`|g^\top H g|`; σ = 2 is "on the edge".
    """
    model = copy.deepcopy(start)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    parameters = list(model.parameters())
    numerator = denominator = 0.0
    largest = 0.0
    for _ in range(config.steps):
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
    outcome = _outcome("CDAT", "none", seed, config.steps, model, optimizer, images, largest)
    return Outcome(**{**vars(outcome), "products": config.steps})


def noise_scaled(start: nn.Module, images: Images, config: Config, seed: int) -> Outcome:
    r"""Set the batch size to the simple noise scale (McCandlish et al., 2018), every 50 steps.

    :math:`B = \mathrm{tr}\,\mathrm{Cov}(g_i)/\|\bar g\|^2`, from the gradients of all samples.
    """
    model = copy.deepcopy(start)
    optimizer = stableopt.SGD(model.parameters(), lr=config.lr)
    sampler = _sampler(images, config.batch_size, seed)
    count = 0

    def follow() -> None:
        nonlocal count
        if count % 50 == 0:
            sampler.batch_size = sampler.nearest(max(_noise_scale(model, images), 1.0))
        count += 1

    follow()
    largest = _train(model, optimizer, images, sampler, config.sgd_steps, follow)
    outcome = _outcome(
        "noise scale", "none", seed, config.sgd_steps, model, optimizer, images, largest
    )
    return Outcome(**{**vars(outcome), "end": _with_batch(outcome.end, sampler.batch_size)})


def scratch_steered(model: nn.Module, images: Images, config: Config, seed: int) -> Outcome:
    """Train from initialisation; the user names the region and nothing else."""
    target = TargetRegion(sharpness=(0, config.scratch_sharpness))
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    sampler = _sampler(images, 32, seed)
    with optimizer.track(
        model,
        mean_squared_error,
        (images.x, images.y),
        every=config.measure_every,
    ) as monitor:
        controller = StabilityController(
            monitor, target, lr={"loss_cap": 1.5 * evaluate(model, images)}
        )
        _train(model, optimizer, images, sampler, config.scratch_steps, controller.step)
    return _outcome(
        "steered",
        "from scratch",
        seed,
        config.scratch_steps,
        model,
        optimizer,
        images,
        controller=controller,
    )


def scratch_constant(
    model: nn.Module, images: Images, config: Config, seed: int, lr: float
) -> Outcome:
    """Train from initialisation at a constant rate."""
    optimizer = stableopt.SGD(model.parameters(), lr=lr)
    sampler = _sampler(images, 32, seed)
    largest = _train(model, optimizer, images, sampler, config.scratch_steps)
    return _outcome(
        f"constant {lr:g}",
        "from scratch",
        seed,
        config.scratch_steps,
        model,
        optimizer,
        images,
        largest,
    )


def _sampler(images: Images, batch_size: int, seed: int) -> AdaptiveBatchSampler:
    n = len(images.x)
    order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    return AdaptiveBatchSampler(order, min(batch_size, n), max=n)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    sampler: AdaptiveBatchSampler,
    steps: int,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train, and return the largest loss of a batch that was seen."""
    largest, whole = 0.0, sampler.batch_size == len(images.x)
    for _, rows in zip(range(steps), _rows(sampler), strict=False):
        # The order of a full batch does not matter, and copying it costs as much as a step.
        x, y = (images.x, images.y) if whole else (images.x[rows], images.y[rows])
        optimizer.zero_grad()
        loss = mean_squared_error(model(x), y)
        loss.backward()
        optimizer.step()
        after_step()
        value = float(loss.detach())
        largest = max(largest, value if math.isfinite(value) else math.inf)
    return largest


def _rows(sampler: AdaptiveBatchSampler) -> Iterator[list[int]]:
    while True:
        yield from sampler


def _outcome(
    method: str,
    region: str,
    seed: int,
    steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    largest: float | None = None,
    controller: StabilityController | None = None,
) -> Outcome:
    history = [] if controller is None else list(controller.monitor.history)
    end = _end(model, optimizer, images)
    if controller is not None:
        size = controller.monitor.batch_size or len(images.x)
        end = _with_batch(end, size)
    losses = [math.inf if m.loss is None else m.loss for m in history]
    products = sum(q.products for m in history for q in m.measurements.values())
    return Outcome(
        method,
        region,
        seed,
        steps,
        products,
        end,
        images.accuracy(model),
        max(losses) if largest is None else largest,
        None if controller is None else controller.target,
        history,
        [] if controller is None else list(controller.decisions),
    )


def _end(model: nn.Module, optimizer: torch.optim.Optimizer, images: Images) -> StabilityMargins:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return stableopt.measure(
            model, mean_squared_error, (images.x, images.y), optimizer=optimizer, tol=1e-3
        )


def _with_batch(margins: StabilityMargins, batch_size: int) -> StabilityMargins:
    return StabilityMargins(**{**vars(margins), "batch_size": batch_size})


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
