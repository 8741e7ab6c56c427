"""Going on from a minimum by another optimizer: the job behind every escape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Images
from benchmarks.training.loops import (
    evaluate,
    independent_batches,
    mean_squared_error,
    reshuffled_batches,
)
from benchmarks.training.minimum import Solution, flops_per_sample, images_for, measured, passes_to
from benchmarks.training.stepping import worth_a_line
from stableopt import UpdateRule

__all__ = ["ESCAPED", "Outcome", "Prediction", "Switch", "box"]

ESCAPED = 10.0
"""SGD has left when the training loss has risen by this factor: noise around a stable minimum makes
it rise two- to fourfold, an escape thirtyfold and more."""


@dataclass(frozen=True)
class Prediction:
    """What a rule says of one learning rate and batch size, from what was measured at the minimum."""

    escapes: bool
    why: str


def box(
    sharpness: float, non_uniformity: float, *, lr: float, batch_size: int, n: int
) -> Prediction:
    """Say whether SGD will leave a minimum, by the paper's necessary conditions (9).

    >>> box(3.5, 5.6, lr=0.5, batch_size=4, n=1000).why
    's = 5.60 > √B/η = 4.01: unstable, will escape'
    >>> box(3.5, 5.6, lr=0.5, batch_size=1000, n=1000).escapes
    False
    """
    rule = UpdateRule(lr=lr)
    a, a_max = sharpness, rule.max_sharpness
    s, s_max = non_uniformity, rule.max_non_uniformity(batch_size, n)
    if a > a_max:
        return Prediction(True, f"a = {a:.2f} > 2/η = {a_max:.2f}: unstable, will escape")
    if s > s_max:
        return Prediction(True, f"s = {s:.2f} > √B/η = {s_max:.2f}: unstable, will escape")
    return Prediction(
        False, f"a = {a:.2f} ≤ {a_max:.2f} and s = {s:.2f} ≤ {s_max:.2f}: stable, will stay"
    )


@dataclass(frozen=True)
class Outcome:
    """What SGD did.

    Attributes:
        escaped_at: the first step looked at by which the training loss had risen tenfold, or
            ``None``.
        largest_loss_ratio: the largest training loss that was seen, by the first.
        after: loss, test accuracy and margins at the end; ``None`` for a run that diverged.
        settled_at: the step after which the loss was small again, if that was waited for.
    """

    escaped_at: int | None
    largest_loss_ratio: float
    after: dict[str, Any] | None
    settled_at: int | None = None


@dataclass(frozen=True)
class Switch(Job):
    """SGD, or GD, from a minimum.

    Attributes:
        start: the minimum.
        lr: learning rate.
        batch_size: of SGD with random reshuffling, ``None`` for GD.
        steps: how many.
        seed: of the batches' order.
        look_every: steps between two looks at the training loss.
        measure_every: steps between two measurements of the margins; ``None`` measures at the end
            only.
        independent: whether batches are drawn independently, not from an order of the samples.
        measure_after: whether the margins at the end are measured.
        settle_loss: after an escape, training goes on until the training loss is at most this;
            ``None`` ends after ``steps``. Only then do minima compare with one another.
        settle_steps: at which it ends in any case.

    The first line of the trace is what :func:`box` says, written before the first step. The result
    has ``predicted`` (``"escape"`` or ``"stay"``) and ``why``, the minimum's own result as
    ``before``, and the fields of :class:`Outcome`.
    """

    kind = "switch"

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

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """Of the steps, and of the looks at the loss, which is a third of a gradient."""
        data = self.start.data
        samples = (
            self.steps * (self.batch_size or data.n) + self.steps / self.look_every * data.n / 3
        )
        if self.settle_loss is not None:
            samples += data.n * passes_to(self.settle_loss, self.lr)
        return samples * flops_per_sample(data.name, self.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Foretell, train, measure."""
        before = work.result(self.start)
        n = self.start.data.n
        said = box(
            before["sharpness"],
            before["non_uniformity"],
            lr=self.lr,
            batch_size=self.batch_size or n,
            n=n,
        )
        predicted = "escape" if said.escapes else "stay"
        work.restored()
        work.trace(step=0, predicted=predicted, why=said.why)
        seen = self.go(work)
        return {"predicted": predicted, "why": said.why, "before": before, **asdict(seen)}

    def go(self, work: Work) -> Outcome:
        """Train from the minimum and say what happened."""
        found = work.result(self.start)
        if found["outcome"] != "reached":
            raise ValueError(f"{self.start.id} has not reached a minimum: {found['outcome']}")
        images = images_for(self.start.data, work)
        model = self.start.model(work.place.device)
        model.load_state_dict(work.tensors(self.start))
        optimizer = stableopt.SGD(model.parameters(), lr=self.lr)
        steps = self._stepping(optimizer, model, images)
        with ExitStack() as tracking:
            if self.measure_every:
                tracking.enter_context(self._tracked(optimizer, model, images, work, tracking))
            escaped_at, largest, loss = self._watch(steps, model, images, work)
        settled_at = None
        if self.settle_loss is not None and escaped_at is not None and loss < math.inf:
            settled_at, loss = self._settle(steps, model, images, work, loss)
        after: dict[str, Any] | None = None
        if loss < math.inf:
            after = {"loss": loss, "test_accuracy": images.accuracy(model)}
            if self.measure_after:
                after.update(measured(model, images, lr=self.lr, batch_size=self.batch_size))
        return Outcome(escaped_at, largest, after, settled_at)

    def _tracked(
        self,
        optimizer: stableopt.SGD,
        model: nn.Module,
        images: Images,
        work: Work,
        tracking: ExitStack,
    ) -> stableopt.StabilityMonitor:
        board = stableopt.TensorBoardSink(work.folder / "tensorboard")
        tracking.callback(board.close)
        return optimizer.track(
            model,
            mean_squared_error,
            (images.x, images.y),
            every=self.measure_every,
            batch_size=self.batch_size or len(images.x),
            quantities=("sharpness", "non_uniformity"),
            sinks=[_Trace(work), board],
        )

    def _stepping(
        self, optimizer: stableopt.SGD, model: nn.Module, images: Images
    ) -> Iterator[int]:
        """Take a step and yield how many there have been, for ever."""
        for step, (x, y) in enumerate(self._batches(images), 1):
            optimizer.zero_grad()
            mean_squared_error(model(x), y).backward()
            optimizer.step()
            yield step

    def _watch(
        self, steps: Iterator[int], model: nn.Module, images: Images, work: Work
    ) -> tuple[int | None, float, float]:
        """Return when it escaped, the largest loss relative to the first, and the last loss."""
        first = loss = evaluate(model, images)
        escaped_at, largest = None, 1.0
        work.trace(step=0, loss=first)
        for step in islice(steps, self.steps):
            if step % self.look_every:
                continue
            loss = evaluate(model, images)
            work.trace(step=step, loss=loss)
            work.progress(step / self.steps, f"{self.how}: step {step:,}, loss {loss:.1e}")
            if not loss < ESCAPED * first and escaped_at is None:
                escaped_at = step
            if not loss < math.inf:
                return escaped_at, math.inf, math.inf
            largest = max(largest, loss / first)
        return escaped_at, largest, loss

    def _settle(
        self, steps: Iterator[int], model: nn.Module, images: Images, work: Work, loss: float
    ) -> tuple[int | None, float]:
        """Return when the loss was small again, and the loss; it is looked at once in an epoch."""
        assert self.settle_loss is not None
        epoch = math.ceil(len(images.x) / (self.batch_size or len(images.x)))
        for step in islice(steps, max(0, self.settle_steps - self.steps)):
            if step % epoch:
                continue
            loss = evaluate(model, images)
            if worth_a_line(step // epoch):
                work.trace(step=step, loss=loss)
            work.progress(step / self.settle_steps, f"{self.how}: step {step:,}, loss {loss:.1e}")
            if loss <= self.settle_loss:
                return step, loss
            if not loss < math.inf:
                break
        return None, loss

    @property
    def how(self) -> str:
        """The optimizer in words."""
        return "GD" if self.batch_size is None else f"SGD, B = {self.batch_size}"

    def _batches(self, images: Images) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        size = self.batch_size or len(images.x)
        kind = independent_batches if self.independent else reshuffled_batches
        return kind(images, size, generator)


class _Trace:
    """A sink that writes margins to a job's trace."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        known = {name: record.get(name) for name in ("sharpness", "non_uniformity")}
        self.work.trace(step=step, **known)
