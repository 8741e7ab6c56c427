"""`Training`: a run of an optimizer, measured at its end; `Search`: the choice of a learning rate."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import (
    all_samples,
    evaluate,
    mean_squared_error,
    reshuffled_batches,
    train,
)
from benchmarks.training.networks import flops_per_sample, network

__all__ = ["METHODS", "Budget", "Chosen", "Method", "Search", "Trained", "Training", "halves"]

Maker = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]

LOOK_EVERY = 50
"""Steps between two evaluations of the training loss, for methods with batches."""

HISTORY = 10
"""History size of L-BFGS."""


@dataclass(frozen=True)
class Budget:
    """When a run stops, and its batch size.

    Attributes:
        target_loss: training loss at which it stops.
        max_steps: largest number of steps.
        min_steps: fewest steps of a run from a minimum, so that it has time to leave.
        batch_size: batch size of SGD.
    """

    target_loss: float = 1e-3
    max_steps: int = 2000
    min_steps: int = 500
    batch_size: int = 16


@dataclass(frozen=True)
class Method:
    """An optimizer, and how it is run.

    Attributes:
        make: creates it from parameters and a learning rate.
        small_batches: whether it trains on batches instead of all samples.
        from_minimum: whether it starts from L-BFGS's minimum.
        closure: whether its ``step`` takes a closure.
        twice: whether it differentiates the gradient.
    """

    make: Maker
    small_batches: bool = False
    from_minimum: bool = False
    closure: bool = False
    twice: bool = False

    @property
    def preconditioned(self) -> bool:
        """Whether its limit is on a preconditioned sharpness."""
        return self.make not in (stableopt.GD, stableopt.SGD)


def _external(name: str, **options: Any) -> Maker:
    def make(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        import torch_optimizer

        optimizer: torch.optim.Optimizer = getattr(torch_optimizer, name)(params, lr=lr, **options)
        return optimizer

    return make


# With one iteration per step, a step costs one gradient.
_lbfgs = partial(stableopt.LBFGS, max_iter=1, history_size=HISTORY)

METHODS = {
    "L-BFGS": Method(_lbfgs, closure=True),
    "L-BFGS, then GD": Method(stableopt.GD, from_minimum=True),
    "L-BFGS, then SGD": Method(stableopt.SGD, small_batches=True, from_minimum=True),
    "GD": Method(stableopt.GD),
    "Adam": Method(torch.optim.Adam),
    "Adahessian": Method(_external("Adahessian"), twice=True),
    "Apollo": Method(_external("Apollo", warmup=50)),
    "Shampoo": Method(_external("Shampoo", epsilon=1e-2, update_freq=20)),
}


@dataclass(frozen=True)
class Trained:
    """The end of a run.

    Attributes:
        lr: learning rate.
        steps: number of steps taken.
        loss: training loss; ``None`` if it is not finite.
        validation: accuracy on the half of the test images that chooses learning rates.
        test: accuracy on the other half.
        sharpness: λmax of the Hessian.
        sharpness_limit: 2/η, for GD and SGD.
        preconditioned_sharpness: λmax of the preconditioned Hessian.
        preconditioned_sharpness_limit: its limit.
    """

    lr: float
    steps: int
    loss: float | None
    validation: float
    test: float
    sharpness: float | None
    sharpness_limit: float | None
    preconditioned_sharpness: float | None
    preconditioned_sharpness_limit: float | None


@dataclass(frozen=True)
class Chosen:
    """The learning rate that a search chose."""

    lr: float


@dataclass(frozen=True)
class Training(Job):
    """A run of a method.

    Attributes:
        data: the images.
        method: a key of :data:`METHODS`.
        seed: seed of initialisation and batches.
        budget: when it stops, and its batch size.
        lr: learning rate, or ``None`` for the one that ``search`` chooses.
        search: the search that chooses the learning rate.
        start: the L-BFGS run from whose minimum it starts, if the method does so.

    The result is a :class:`Trained`; the weights are saved.
    """

    kind = "quasi-newton"
    Result: ClassVar = Trained

    data: Dataset
    method: str
    seed: int
    budget: Budget
    lr: float | None = None
    search: Search | None = None
    start: Training | None = None

    @property
    def needs(self) -> tuple[Job, ...]:
        """The search and the L-BFGS run, if any."""
        return tuple(job for job in (self.search, self.start) if job is not None)

    @property
    def flops(self) -> float:
        """The largest number of steps, and a hundred products."""
        method = METHODS[self.method]
        size = self.budget.batch_size if method.small_batches else self.data.n
        samples = self.budget.max_steps * size * (3 if method.twice else 1) + 300 * self.data.n
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train and measure, or copy the search's own run with this learning rate and seed."""
        lr = self.lr
        if self.search is not None:
            lr = work.result(self.search).lr
            for trial in self.search.trials:
                if (trial.lr, trial.seed) == (lr, self.seed):
                    work.save(work.tensors(trial))
                    return asdict(work.result(trial))
        assert lr is not None
        images = images_for(self.data, work)
        model = network(self.data.name, seed=self.seed).to(work.place.device)
        if self.start is not None:
            model.load_state_dict(work.tensors(self.start))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Warnings of a graph kept in .grad, which _train removes, and of torch_optimizer's calls.
            warnings.filterwarnings("ignore", "Using backward|This overload", UserWarning)
            torch.manual_seed(self.seed)  # Adahessian draws from the global generator
            optimizer = METHODS[self.method].make(model.parameters(), lr)
            steps, failed = _train(self, model, optimizer, images, work)
        work.save(model.state_dict())
        loss = math.nan if failed else evaluate(model, images)
        chosen_on, reported_on = halves(images)
        accuracies = {"validation": chosen_on.accuracy(model), "test": reported_on.accuracy(model)}
        result = {"lr": lr, "steps": steps, "loss": loss, **accuracies}
        return {**result, **_measured(self, model, optimizer, images, loss)}


@dataclass(frozen=True)
class Search(Job):
    """The choice of a learning rate: the best accuracy among runs that came near the target loss.

    Attributes:
        trials: runs that differ only in their learning rate.

    The result is a :class:`Chosen`.
    """

    kind = "quasi-newton-search"
    Result: ClassVar = Chosen

    trials: tuple[Training, ...]

    @property
    def needs(self) -> tuple[Job, ...]:
        """The trials."""
        return self.trials

    def run(self, work: Work) -> dict[str, Any]:
        """Choose the learning rate."""
        return {"lr": max((work.result(trial) for trial in self.trials), key=self._rank).lr}

    def _rank(self, result: Trained) -> tuple[bool, float]:
        largest_loss = 10 * self.trials[0].budget.target_loss
        return result.loss is not None and result.loss <= largest_loss, result.validation


def halves(images: Images) -> tuple[Images, Images]:
    """Return the images with the even-numbered, and with the odd-numbered, test images."""
    first, second = (
        replace(images, test_x=images.test_x[k::2], test_labels=images.test_labels[k::2])
        for k in (0, 1)
    )
    return first, second


def _train(
    job: Training, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, work: Work
) -> tuple[int, bool]:
    """Train; return the number of steps, and whether the optimizer raised an error."""
    method, budget = METHODS[job.method], job.budget
    min_steps = budget.min_steps if method.from_minimum else 0
    batches, steps, failed = all_samples(images), 0, False
    if method.small_batches:
        generator = torch.Generator().manual_seed(job.seed)
        batches = reshuffled_batches(images, budget.batch_size, generator)

    def after_step(step: int, loss: float) -> bool:
        nonlocal steps
        steps = step
        # With batches, the training loss must be evaluated.
        evaluates = method.small_batches and step % LOOK_EVERY == 0
        value = evaluate(model, images) if evaluates else loss
        if step % LOOK_EVERY == 0:
            work.trace(step=step, loss=value)
            work.progress(step / budget.max_steps, f"{job.method}, {step:,}, {value:.1e}")
        has_training_loss = evaluates or not method.small_batches
        return not value < math.inf or (
            has_training_loss and step >= min_steps and value <= budget.target_loss
        )

    try:
        train(
            model,
            optimizer,
            batches,
            steps=budget.max_steps,
            after_step=after_step,
            closure=method.closure,
            create_graph=method.twice,
        )
    except torch.linalg.LinAlgError:  # Shampoo, on statistics that are not finite
        steps, failed = steps + 1, True
    for p in model.parameters():
        p.grad = None  # frees the graph that double backward keeps there
    return steps, failed


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
            images.samples,
            optimizer=optimizer,
            batch_size=job.budget.batch_size if METHODS[job.method].small_batches else None,
            quantities=("sharpness",),
            max_iter=300,
        )
    names = ("sharpness", "preconditioned_sharpness")
    keys = [key for name in names for key in (name, f"{name}_limit")]
    return {key: getattr(margins, key) for key in keys}
