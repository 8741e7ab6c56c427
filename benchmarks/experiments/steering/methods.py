"""`Contest`: steering and its baselines, all from the same minimum."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import RandomSampler

import stableopt
from benchmarks.framework.tables import Row
from benchmarks.training.data import Images
from benchmarks.training.loops import all_samples, evaluate, gd_until, mean_squared_error, train
from benchmarks.training.measured import BOTH
from stableopt import (
    AdaptiveBatchSampler,
    StabilityController,
    StabilityMargins,
    StabilityMonitor,
    TargetRegion,
)
from stableopt.steering.decision import marks

__all__ = ["REGIONS", "Budget", "Contest", "noise_scale"]

REGIONS = {
    "1.5x flatter": TargetRegion.flatter(by=1.5),
    "2x flatter": TargetRegion.flatter(by=2),
    "4x flatter": TargetRegion.flatter(by=4),
    "more uniform": TargetRegion.more_uniform(by=1.5),
    "both": TargetRegion(sharpness=(0, 1 / 2), non_uniformity=(0, 1 / 2), unit="present"),
    "sharper": TargetRegion.sharper(by=1.25),
}
"""Targets relative to gradient descent's minimum."""

UNBOUNDED = (0.0, math.inf)


@dataclass(frozen=True)
class Budget:
    """Settings of the runs.

    Attributes:
        lr: learning rate of gradient descent, and initial one of runs from its minimum.
        start_loss: training loss at which gradient descent stops and steering begins.
        steps: steps of a run with full batches.
        sgd_steps: steps of a run with smaller batches.
        batch_size: initial batch size of such a run.
        measure_every: steps between measurements with full batches; five times as many otherwise.
        grid_lrs: final learning rates of the grid-searched schedules, as multiples of ``lr``.
        grid_ramps: lengths of their ramps in steps.
        scratch_steps: steps of a run from initialisation; 0 for no such runs.
        scratch_sharpness: upper bound on the sharpness to which such a run is steered.
        scratch_lrs: constant learning rates of its baselines.
    """

    lr: float = 0.5
    start_loss: float = 5e-4
    steps: int = 1500
    sgd_steps: int = 3000
    batch_size: int = 64
    measure_every: int = 10
    grid_lrs: tuple[float, ...] = (1.5, 2.0, 4.0)
    grid_ramps: tuple[int, ...] = (1, 300)
    scratch_steps: int = 1500
    scratch_sharpness: float = 2.0
    scratch_lrs: tuple[float, ...] = (0.1, 0.5, 1.0)


class Run:
    """A training run by GD or, with a batch size, by SGD.

    Args:
        start: the initial network; a copy is trained.
        images: the training and test set.
        seed: seed of the batches' order.
        lr: initial learning rate.
        batch_size: initial batch size; ``None`` for GD.
    """

    def __init__(
        self, start: nn.Module, images: Images, seed: int, lr: float, batch_size: int | None = None
    ) -> None:
        n = len(images.x)
        self.model, self.images, self.seed = copy.deepcopy(start), images, seed
        optimizer = stableopt.GD if batch_size is None else stableopt.SGD
        self.optimizer = optimizer(self.model.parameters(), lr=lr)
        order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
        size = n if batch_size is None else min(batch_size, n)
        self.sampler = AdaptiveBatchSampler(order, size, max_batch_size=n)
        self.steps = self.products = 0
        self.largest_loss = 0.0
        self.controller: StabilityController | None = None

    def train(
        self, steps: int, after_step: Callable[[int], object] = lambda step: None, **hooks: Any
    ) -> Run:
        """Take steps, and record the largest batch loss."""

        def record_loss(step: int, loss: float) -> None:
            self.largest_loss = max(self.largest_loss, loss if math.isfinite(loss) else math.inf)
            after_step(step)

        # A full batch needs no shuffled copy, which would cost as much as a step.
        is_full_batch = self.sampler.batch_size == len(self.images.x)
        batches = all_samples(self.images) if is_full_batch else self._batches()
        train(self.model, self.optimizer, batches, steps=steps, after_step=record_loss, **hooks)
        self.steps += steps
        return self

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for rows in self.sampler:
                yield self.images.x[rows], self.images.y[rows]

    def tracked(self, every: int, quantities: tuple[str, ...]) -> StabilityMonitor:
        """Return a monitor of the run, for a ``with`` statement."""
        return self.optimizer.track(
            self.model,
            mean_squared_error,
            self.images.samples,
            every=every,
            quantities=quantities,
        )

    @cached_property
    def end(self) -> StabilityMargins:
        """The margins after the last step, to a tolerance of 1e-3."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return stableopt.measure(
                self.model,
                mean_squared_error,
                self.images.samples,
                optimizer=self.optimizer,
                quantities=BOTH,
                tol=1e-3,
            )

    def row(
        self, method: str, region: str, target: TargetRegion | None = None, **overrides: Any
    ) -> Row:
        """Return a row of the table of runs.

        Args:
            method: name of the method.
            region: name of the target region, or of the comparison.
            target: the target region, if any.
            overrides: columns whose values replace the run's.
        """
        names = ("lr", "batch_size", "loss", "sharpness", "non_uniformity", "failed")
        end = self.end.record()
        low = high = s_low = s_high = aim = None
        if target is not None:
            (low, high), (s_low, s_high) = target.sharpness, target.non_uniformity
            aim = target.aim
        has_ratio = aim is not None and self.end.sharpness is not None
        return {
            **{"method": method, "region": region, "seed": self.seed, "steps": self.steps},
            "products": self.products,
            **{name: end.get(name) for name in names},
            "test_accuracy": self.images.accuracy(self.model),
            "largest_loss": self.largest_loss,
            **{"target_sharpness": high, "least_sharpness": low, "aim": aim},
            **{"least_non_uniformity": s_low, "target_non_uniformity": s_high},
            "sharpness_to_target": self.end.sharpness / aim if has_ratio else None,
            "said": "",
            **overrides,
        }

    def steered_row(self, region: str) -> Row:
        """Return the row of a run with a controller, with its monitor's measurements."""
        assert self.controller is not None
        monitor = self.controller.monitor
        said = (str(d) for d in self.controller.decisions if d.what == "target")
        return self.row(
            "steered",
            region,
            self.controller.target,
            products=sum(q.products for m in monitor.history for q in m.measurements.values()),
            batch_size=float(monitor.batch_size or len(self.images.x)),
            largest_loss=max(math.inf if m.loss is None else m.loss for m in monitor.history),
            said="; ".join(said),
        )

    def path(self) -> list[Row]:
        """Return a row for each measurement, marked with the controller's decision after it."""
        assert self.controller is not None
        finite = [m for m in self.controller.monitor.history if m.failure is None]
        notes: dict[int, str] = {}
        for step, label in marks(d for d in self.controller.decisions if d.changes):
            measured_at = max((m.step for m in finite if m.step <= step), default=0)
            notes.setdefault(measured_at, label)
        names = ("lr", "batch_size", "loss", "sharpness", "sharpness_limit", "non_uniformity")
        return [
            {"step": m.step, **{name: getattr(m, name) for name in names}}
            | {"mark": notes.get(m.step)}
            for m in finite
        ]


@dataclass(frozen=True)
class Contest:
    """Runs from the same minimum, and from the same initialisation, with the same budget.

    Attributes:
        initial: the network at initialisation.
        images: the training and test set.
        seed: seed of the batches' order.
        budget: settings of the runs.
    """

    initial: nn.Module
    images: Images
    seed: int
    budget: Budget

    @cached_property
    def minimum(self) -> Run:
        """The run of gradient descent to the minimum."""
        budget, run = self.budget, Run(self.initial, self.images, self.seed, self.budget.lr)
        run.largest_loss = evaluate(run.model, run.images)
        run.steps = gd_until(
            budget.start_loss, run.model, run.images, run.optimizer, max_steps=10**6
        )
        return run

    def rows(self) -> Iterator[tuple[Row, list[Row]]]:
        """Yield each run's row, and its path if it is steered from the minimum, else an empty list."""
        budget = self.budget
        yield self.minimum.row("GD", "the minimum"), []
        for region in REGIONS:
            run = self._steered(region)
            yield run.steered_row(region), run.path()
        yield self._from_minimum().train(budget.steps).row("fixed", "none"), []
        for row in self._grid_searched():
            yield row, []
        yield self._curvature_aware(), []
        yield self._noise_scaled(), []
        if budget.scratch_steps:
            yield self._steered_from_scratch(), []
            for lr in budget.scratch_lrs:
                run = self._from_scratch(lr).train(budget.scratch_steps)
                yield run.row(f"constant {lr:g}", "from scratch"), []

    def _from_minimum(self, batch_size: int | None = None) -> Run:
        return Run(self.minimum.model, self.images, self.seed, self.budget.lr, batch_size)

    def _from_scratch(self, lr: float) -> Run:
        return Run(self.initial, self.images, self.seed, lr, batch_size=32)

    def _steered(self, region: str) -> Run:
        """Steer to a region, with full batches if it bounds only the sharpness."""
        budget, target = self.budget, REGIONS[region]
        is_sgd = target.non_uniformity != UNBOUNDED
        run = self._from_minimum(budget.batch_size if is_sgd else None)
        every = budget.measure_every * (5 if is_sgd else 1)
        with run.tracked(every, BOTH if is_sgd else ("sharpness",)) as monitor:
            monitor.measure()
            run.controller = controller = StabilityController(
                monitor,
                target,
                lr=target.sharpness != UNBOUNDED and {"loss_cap": self.minimum.largest_loss},
                batch=run.sampler if is_sgd else None,
            )
            steps = budget.sgd_steps if is_sgd else budget.steps
            return run.train(steps, lambda step: controller.step())

    def _steered_from_scratch(self) -> Row:
        """Steer from initialisation, given only an upper bound on the sharpness."""
        budget, run = self.budget, self._from_scratch(lr=0.01)
        with run.tracked(budget.measure_every, ("sharpness",)) as monitor:
            run.controller = controller = StabilityController(
                monitor,
                TargetRegion(sharpness=(0, budget.scratch_sharpness)),
                lr={"loss_cap": 1.5 * evaluate(run.model, self.images)},
            )
            run.train(budget.scratch_steps, lambda step: controller.step())
        return run.steered_row("from scratch")

    def _grid_searched(self) -> Iterator[Row]:
        """Yield, for each flatter region, the learning-rate ramp that ended nearest to it."""
        runs = [
            self._ramp(factor, ramp)
            for factor in self.budget.grid_lrs
            for ramp in self.budget.grid_ramps
        ]
        steps = sum(run.steps for run in runs)
        for region in ("1.5x flatter", "2x flatter", "4x flatter"):
            target = REGIONS[region].resolve(self.minimum.end)
            aim = target.aim
            assert aim is not None
            best = min(runs, key=lambda run: _log_distance(run.end.sharpness, aim))
            yield best.row("grid-searched", region, target, steps=steps)

    def _ramp(self, factor: float, ramp: int) -> Run:
        run = self._from_minimum()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            run.optimizer, lambda step: factor ** min((step + 1) / ramp, 1.0)
        )
        return run.train(self.budget.steps, lambda step: schedule.step())

    def _curvature_aware(self, scale: float = 2.0) -> Row:
        r"""Set the learning rate by CDAT (Roulet et al., "Stepping on the edge", 2024).

        :math:`\eta_t = \sigma\,n_t/d_t` with n and d the running means, at 0.9, of
        :math:`\|g\|^2` and :math:`|g^\top H g|`; σ = 2 is "on the edge".
        """
        run = self._from_minimum()
        parameters = list(run.model.parameters())
        numerator = denominator = 0.0

        def set_rate(step: int, loss: float) -> None:
            nonlocal numerator, denominator
            gradients = [p.grad for p in parameters if p.grad is not None]
            frozen = [g.detach() for g in gradients]
            along = sum((g * f).sum() for g, f in zip(gradients, frozen, strict=True))
            products = torch.autograd.grad(along, parameters)
            square = float(sum(f.square().sum() for f in frozen))
            curved = float(sum((f * h).sum() for f, h in zip(frozen, products, strict=True)))
            numerator = 0.9 * numerator + 0.1 * square
            denominator = 0.9 * denominator + 0.1 * abs(curved)
            run.optimizer.param_groups[0]["lr"] = scale * numerator / max(denominator, 1e-30)
            for p, f in zip(parameters, frozen, strict=True):
                p.grad = f

        with warnings.catch_warnings():
            # set_rate replaces each gradient by a detached one, which frees its graph.
            warnings.filterwarnings("ignore", "Using backward", UserWarning)
            run.train(self.budget.steps, before_step=set_rate, create_graph=True)
        return run.row("CDAT", "none", products=run.steps)

    def _noise_scaled(self) -> Row:
        """Set the batch size to the :func:`noise_scale` every 50 steps."""
        run = self._from_minimum(self.budget.batch_size)

        def follow(step: int) -> None:
            if step % 50 == 0:
                scale = noise_scale(run.model, self.images)
                run.sampler.batch_size = run.sampler.nearest(max(scale, 1.0))

        follow(0)
        run.train(self.budget.sgd_steps, follow)
        return run.row("noise scale", "none", batch_size=float(run.sampler.batch_size))


def _log_distance(sharpness: float | None, aim: float) -> float:
    if sharpness is None or not sharpness > 0:
        return math.inf
    return abs(math.log(sharpness / aim))


def noise_scale(model: nn.Module, images: Images) -> float:
    r"""Return the simple noise scale of per-sample gradients (McCandlish et al., 2018), a batch size.

    It is :math:`\mathrm{tr}\,\mathrm{Cov}(g_i)/\|\bar g\|^2`.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mean_squared_error(functional_call(model, parameters, (x,)), y)

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images.x, images.y)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).double()
    mean = flat.mean(0)
    square = float(mean.square().sum())
    return float((flat - mean).square().sum()) / len(flat) / max(square, 1e-300)
