"""Training by one of many optimizers, the search for its rate, and what the end is like."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import evaluate, mean_squared_error, reshuffled_batches
from benchmarks.training.networks import flops_per_sample, network

__all__ = ["METHODS", "Budget", "Method", "Search", "Training", "halves"]

Maker = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]

LOOK_EVERY = 50
"""Steps between two looks at the training loss, where a step sees only a batch."""

HISTORY = 10
"""Pairs that L-BFGS remembers."""


@dataclass(frozen=True)
class Budget:
    """What a run may take.

    Attributes:
        target_loss: training loss at which it ends.
        max_steps: at which it ends in any case.
        min_steps: of what starts at a minimum, so that it has time to leave.
        batch_size: of SGD.
    """

    target_loss: float = 1e-3
    max_steps: int = 2000
    min_steps: int = 500
    batch_size: int = 16


@dataclass(frozen=True)
class Method:
    """How to make the optimizer, and what feeds it.

    Attributes:
        make: it, of parameters and learning rate.
        small_batches: whether it takes batches.
        from_minimum: whether it starts where L-BFGS ended.
        closure: whether its step takes a closure.
        twice: whether it differentiates twice.
    """

    make: Maker
    small_batches: bool = False
    from_minimum: bool = False
    closure: bool = False
    twice: bool = False


def _external(name: str, **options: Any) -> Maker:
    def make(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        import torch_optimizer

        optimizer: torch.optim.Optimizer = getattr(torch_optimizer, name)(params, lr=lr, **options)
        return optimizer

    return make


def _lbfgs(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    # One iteration a step: each costs one gradient.
    return stableopt.LBFGS(params, lr=lr, max_iter=1, history_size=HISTORY)


def _gd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return stableopt.GD(params, lr=lr)


def _sgd(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return stableopt.SGD(params, lr=lr)


def _adam(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


METHODS = {
    "L-BFGS": Method(_lbfgs, closure=True),
    "L-BFGS, then GD": Method(_gd, from_minimum=True),
    "L-BFGS, then SGD": Method(_sgd, small_batches=True, from_minimum=True),
    "GD": Method(_gd),
    "Adam": Method(_adam),
    "Adahessian": Method(_external("Adahessian"), twice=True),
    "Apollo": Method(_external("Apollo", warmup=50)),
    "Shampoo": Method(_external("Shampoo", epsilon=1e-2, update_freq=20)),
}


@dataclass(frozen=True)
class Training(Job):
    """One run of one method.

    Attributes:
        data: the images.
        method: of :data:`METHODS`.
        seed: of initialisation and batches.
        budget: what it may take.
        lr: learning rate, or ``None`` for the one that ``search`` has chosen.
        search: that chose it.
        start: the L-BFGS run at whose end it begins, for a method that does.

    The result has ``lr``, ``steps``, ``loss``, the accuracy on both halves of the test images
    (``validation``, by which rates are chosen, and ``test``), sharpness and preconditioned
    sharpness with their limits. The weights are kept.
    """

    kind = "quasi-newton"

    data: Dataset
    method: str
    seed: int
    budget: Budget
    lr: float | None = None
    search: Search | None = None
    start: Training | None = None

    @property
    def needs(self) -> tuple[Job, ...]:
        """The search and the start."""
        return tuple(job for job in (self.search, self.start) if job is not None)

    @property
    def flops(self) -> float:
        """Of the most steps, and a hundred products."""
        method = METHODS[self.method]
        size = self.budget.batch_size if method.small_batches else self.data.n
        samples = self.budget.max_steps * size * (3 if method.twice else 1) + 300 * self.data.n
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train and measure; or, where the search has done so at its rate and seed, take that."""
        lr = self.lr
        if self.search is not None:
            lr = work.result(self.search)["lr"]
            for trial in self.search.trials:
                if (trial.lr, trial.seed) == (lr, self.seed):
                    work.save(work.tensors(trial))
                    return work.result(trial)
        assert lr is not None
        images = images_for(self.data, work)
        model = network(self.data.name, seed=self.seed).to(work.place.device)
        if self.start is not None:
            model.load_state_dict(work.tensors(self.start))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Of a graph that leaks, which _train sees to; of old calls in torch_optimizer.
            warnings.filterwarnings("ignore", "Using backward|This overload", UserWarning)
            torch.manual_seed(self.seed)  # Adahessian draws from the global generator
            optimizer = METHODS[self.method].make(model.parameters(), lr)
            steps, lost = _train(self, model, optimizer, images, work)
        work.save(model.state_dict())
        loss = math.nan if lost else evaluate(model, images)
        chosen_on, reported_on = halves(images)
        found = {
            **{"lr": lr, "steps": steps, "loss": loss},
            "validation": chosen_on.accuracy(model),
            "test": reported_on.accuracy(model),
        }
        return {**found, **_measured(self, model, optimizer, images, loss)}


@dataclass(frozen=True)
class Search(Job):
    """The choice of a learning rate: of the runs that got there, or nearly, the best.

    Attributes:
        trials: runs that differ in their rates.

    The result has the ``lr``.
    """

    kind = "quasi-newton-search"

    trials: tuple[Training, ...]

    @property
    def needs(self) -> tuple[Job, ...]:
        """The trials."""
        return self.trials

    def run(self, work: Work) -> dict[str, Any]:
        """Choose."""
        return {"lr": max((work.result(trial) for trial in self.trials), key=self._worth)["lr"]}

    def _worth(self, found: dict[str, Any]) -> tuple[bool, float]:
        near = 10 * self.trials[0].budget.target_loss
        return found["loss"] is not None and found["loss"] <= near, found["validation"]


def halves(images: Images) -> tuple[Images, Images]:
    """Return the images with every other test image, and with the others."""
    first, second = (
        replace(images, test_x=images.test_x[k::2], test_labels=images.test_labels[k::2])
        for k in (0, 1)
    )
    return first, second


def _train(
    job: Training, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, work: Work
) -> tuple[int, bool]:
    """Train; return the number of steps, and whether the optimizer was lost on the way."""
    method, budget = METHODS[job.method], job.budget
    least = budget.min_steps if method.from_minimum else 0
    steps, lost = 0, False
    for steps, (x, y) in enumerate(_batches(job, images), start=1):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = mean_squared_error(model(x), y)
            torch.autograd.backward(loss, create_graph=method.twice)
            return loss

        try:
            if method.closure:
                loss = optimizer.step(closure)
            else:
                loss = closure()
                optimizer.step()
        except torch.linalg.LinAlgError:  # Shampoo decomposes its statistics, good or bad
            lost = True
            break
        # A batch's loss is not the training loss.
        looks = method.small_batches and steps % LOOK_EVERY == 0
        value = evaluate(model, images) if looks else float(loss.detach())
        if steps % LOOK_EVERY == 0:
            work.trace(step=steps, loss=value)
            work.progress(steps / budget.max_steps, f"{job.method}, {steps:,}, {value:.1e}")
        if not value < math.inf or steps == budget.max_steps:
            break
        known = looks or not method.small_batches
        if known and steps >= least and value <= budget.target_loss:
            break
    for p in model.parameters():
        p.grad = None  # and with it the graph that double backward leaves there
    return steps, lost


def _batches(job: Training, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    if METHODS[job.method].small_batches:
        generator = torch.Generator().manual_seed(job.seed)
        return reshuffled_batches(images, job.budget.batch_size, generator)
    return iter(lambda: (images.x, images.y), None)


def _measured(
    job: Training,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    loss: float,
) -> dict[str, Any]:
    margins = stableopt.StabilityMargins()
    if loss < math.inf:
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            optimizer=optimizer,
            batch_size=job.budget.batch_size if METHODS[job.method].small_batches else None,
            quantities=("sharpness",),
            max_iter=300,
        )
    names = ("sharpness", "preconditioned_sharpness")
    keys = [key for name in names for key in (name, f"{name}_limit")]
    return {key: getattr(margins, key) for key in keys}
