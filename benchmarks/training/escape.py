"""`Switch`: the job that continues from a minimum by SGD or GD and records whether it escapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Images
from benchmarks.training.loops import (
    evaluate,
    independent_batches,
    mean_squared_error,
    reshuffled_batches,
    train,
)
from benchmarks.training.measured import BOTH, measured
from benchmarks.training.minimum import Minimum, Solution, Start, from_minimum, passes_to
from benchmarks.training.networks import flops_per_sample
from benchmarks.training.spec import is_traced
from benchmarks.training.update import SGD, Update

__all__ = ["ESCAPED", "RETURNED", "Escape", "Prediction", "Switch", "box"]

ESCAPED = 10.0
"""SGD has escaped when the training loss has risen by this factor. Noise around a stable minimum raises
it two- to fourfold, an escape at least thirtyfold."""

RETURNED = 0.75
"""It has returned when final over initial sharpness is between this number and its inverse. Chosen on
the digits as the geometric mean of 0.96, where SGD stayed, and 0.60, the largest ratio where it left."""


@dataclass(frozen=True)
class Prediction:
    """A rule's prediction for one learning rate and batch size, from measurements at the minimum."""

    escapes: bool
    why: str


def box(
    sharpness: float,
    non_uniformity: float,
    *,
    lr: float,
    batch_size: int,
    n: int,
    update: Update = SGD,
) -> Prediction:
    """Predict by the paper's necessary conditions (9) whether SGD leaves a minimum.

    With momentum, the limits are those of the step with momentum.

    >>> box(3.5, 5.6, lr=0.5, batch_size=4, n=1000).why
    's = 5.60 > √B/η = 4.01: unstable, will escape'
    >>> box(3.5, 5.6, lr=0.5, batch_size=1000, n=1000).escapes
    False
    """
    rule = update.rule(lr)
    a, a_max = sharpness, rule.max_sharpness
    s, s_max = non_uniformity, rule.max_non_uniformity(batch_size, n)
    a_name, s_name = ("2/η", "√B/η") if update == SGD else ("its limit", "its limit")
    if a > a_max:
        return Prediction(True, f"a = {a:.2f} > {a_name} = {a_max:.2f}: unstable, will escape")
    if s > s_max:
        return Prediction(True, f"s = {s:.2f} > {s_name} = {s_max:.2f}: unstable, will escape")
    return Prediction(
        False, f"a = {a:.2f} ≤ {a_max:.2f} and s = {s:.2f} ≤ {s_max:.2f}: stable, will stay"
    )


@dataclass(frozen=True)
class Escape:
    """The prediction for a run from a minimum, and the run's outcome.

    Attributes:
        escaped_at: the first evaluated step at which the training loss had risen tenfold, or
            ``None``.
        largest_loss_ratio: largest over initial training loss; ``None`` if not finite.
        after: training loss, test accuracy and margins at the end; ``None`` if the run diverged.
        settled_at: step at which the loss was small again, if the run continued until then.
        predicted: ``"escape"`` or ``"stay"``.
        why: the measured numbers and their limits.
        before: the minimum.
    """

    escaped_at: int | None
    largest_loss_ratio: float | None
    after: dict[str, Any] | None
    settled_at: int | None = None
    predicted: str = ""
    why: str = ""
    before: Minimum | None = None

    def __post_init__(self) -> None:
        """Convert ``before``, if it comes from JSON."""
        if isinstance(self.before, dict):
            object.__setattr__(self, "before", Solution.typed(self.before))

    @property
    def returned(self) -> bool:
        """Whether the loss rose tenfold, but training ended at about the initial sharpness.

        Such an excursion happens near a threshold: noise moves the weights far away, and the minimum
        still attracts them. ``False`` for runs that were not measured at their end.
        """
        final_sharpness = (self.after or {}).get("sharpness")
        if self.escaped_at is None or final_sharpness is None or self.before is None:
            return False
        assert self.before.sharpness is not None
        return RETURNED <= final_sharpness / self.before.sharpness <= 1 / RETURNED

    @property
    def as_predicted(self) -> bool:
        """Whether the run escaped without returning if and only if that was predicted."""
        left_for_good = self.escaped_at is not None and not self.returned
        return (self.predicted == "escape") == left_for_good


@dataclass(frozen=True)
class Switch(Job):
    """A run of SGD or GD from a minimum.

    Attributes:
        start: the minimum.
        lr: learning rate.
        batch_size: batch size of SGD with random reshuffling; ``None`` for GD.
        steps: number of steps.
        seed: seed of the batches' order.
        look_every: steps between two evaluations of the training loss.
        measure_every: steps between two measurements of the margins; ``None`` for none on the way.
        independent: whether each batch is drawn independently, instead of random reshuffling.
        measure_after: whether the margins are measured at the end.
        settle_loss: after an escape, training continues down to this training loss, so that the end
            is comparable with other minima; ``None`` stops after ``steps``.
        settle_steps: largest total number of steps.
        update: the update rule; plain SGD by default.

    The first line of the trace is the prediction of :func:`box`, written before the first step. The
    result is an :class:`Escape`.
    """

    kind = "switch"
    Result: ClassVar = Escape

    start: Solution
    lr: float
    batch_size: int | None
    steps: int = 1000
    seed: int = 0
    look_every: int = 10
    measure_every: int | None = None
    independent: bool = False
    measure_after: bool = True
    settle_loss: float | None = None
    settle_steps: int = 300_000
    update: Update = SGD

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """The steps, and the evaluations of the loss, each a third of a gradient."""
        data = self.start.data
        samples = (
            self.steps * (self.batch_size or data.n) + self.steps / self.look_every * data.n / 3
        )
        if self.settle_loss is not None:
            samples += data.n * passes_to(self.settle_loss, self.lr)
        return samples * flops_per_sample(data.name, self.start.network)

    @property
    def how(self) -> str:
        """The optimizer's name and batch size."""
        return "GD" if self.batch_size is None else f"SGD, B = {self.batch_size}"

    def run(self, work: Work) -> dict[str, Any]:
        """Predict, train, measure."""
        start = from_minimum(self.start, work)
        n, before = self.start.data.n, start.minimum
        assert before.sharpness is not None
        assert before.non_uniformity is not None
        prediction = box(
            before.sharpness,
            before.non_uniformity,
            lr=self.lr,
            batch_size=self.batch_size or n,
            n=n,
            update=self.update,
        )
        predicted = "escape" if prediction.escapes else "stay"
        work.restored()
        work.trace(step=0, predicted=predicted, why=prediction.why)
        escape = self.train_from(start, work)
        return asdict(replace(escape, predicted=predicted, why=prediction.why, before=before))

    def train_from(self, start: Start, work: Work) -> Escape:
        """Train from the minimum; return the outcome, without a prediction."""
        _, model, images = start
        run = _Run(self, start, work)
        with ExitStack() as tracking:
            if self.measure_every:
                board = stableopt.TensorBoardSink(work.folder / "tensorboard")
                tracking.callback(board.close)
                monitor = run.optimizer.track(
                    model,
                    mean_squared_error,
                    images.samples,
                    every=self.measure_every,
                    batch_size=self.batch_size or len(images.x),
                    quantities=BOTH,
                    sinks=[run.record, board],
                )
                tracking.enter_context(monitor)
            run.advance(self.steps, run.watch)
        if self.settle_loss is not None and run.escaped_at is not None and run.loss < math.inf:
            run.advance(max(0, self.settle_steps - self.steps), run.settle)
        after: dict[str, Any] | None = None
        if run.loss < math.inf:
            after = {"loss": run.loss, "test_accuracy": images.accuracy(model)}
            if self.measure_after:
                after.update(measured(model, images, lr=self.lr, batch_size=self.batch_size))
        return Escape(run.escaped_at, run.largest, after, run.settled_at)

    def _batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        size = self.batch_size or len(images.x)
        draw = independent_batches if self.independent else reshuffled_batches
        return draw(images, size, generator)


class _Run:
    """The training of a switch: its state, and the hooks that evaluate the loss."""

    def __init__(self, job: Switch, start: Start, work: Work) -> None:
        self.job, self.work = job, work
        _, self.model, self.images = start
        self.optimizer = job.update.optimizer(self.model, self.images, job.lr)
        self.batches = job._batches(self.images)
        self.epoch = math.ceil(len(self.images.x) / (job.batch_size or len(self.images.x)))
        self.first = self.loss = evaluate(self.model, self.images)
        self.escaped_at: int | None = None
        self.settled_at: int | None = None
        self.largest, self.taken = 1.0, 0
        work.trace(step=0, loss=self.first)

    def advance(self, steps: int, hook: Any) -> None:
        """Take steps until the hook ends the training."""

        def after_step(step: int, loss: float) -> bool:
            self.taken += 1
            ended: bool = hook()
            return ended

        train(self.model, self.optimizer, self.batches, steps=steps, after_step=after_step)

    def watch(self) -> bool:
        """Hook: record an escape; stop at a non-finite loss."""
        if self.taken % self.job.look_every:
            return False
        self._evaluate(self.job.steps)
        self.work.trace(step=self.taken, loss=self.loss)
        if not self.loss < ESCAPED * self.first and self.escaped_at is None:
            self.escaped_at = self.taken
        if not self.loss < math.inf:
            self.loss = self.largest = math.inf
            return True
        self.largest = max(self.largest, self.loss / self.first)
        return False

    def settle(self) -> bool:
        """Hook: evaluate once per epoch; stop when the loss is small again or not finite."""
        if self.taken % self.epoch:
            return False
        self._evaluate(self.job.settle_steps)
        if is_traced(self.taken // self.epoch):
            self.work.trace(step=self.taken, loss=self.loss)
        assert self.job.settle_loss is not None
        if self.loss <= self.job.settle_loss:
            self.settled_at = self.taken
        return self.settled_at is not None or not self.loss < math.inf

    def record(self, step: int, record: Any) -> None:
        """Sink: write the margins to the trace."""
        margins = {name: record.get(name) for name in BOTH}
        self.work.trace(step=step, **margins)

    def _evaluate(self, steps: int) -> None:
        self.loss = evaluate(self.model, self.images)
        text = f"{self.job.how}: step {self.taken:,}, loss {self.loss:.1e}"
        self.work.progress(self.taken / steps, text)
