"""Going on from a minimum by another optimizer: the job behind every escape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import stableopt
from benchmarks.data import Images
from benchmarks.runner import Job, Work
from benchmarks.solution import Solution, flops_per_sample, images_for
from benchmarks.training import evaluate, mean_squared_error, reshuffled_batches
from stableopt import UpdateRule

__all__ = ["ESCAPED", "Prediction", "Switch", "box"]

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

    The first line of the trace is what :func:`box` says, written before the first step. The result
    has ``predicted`` (``"escape"`` or ``"stay"``) and ``why``; ``escaped_at``, the first step
    looked at by which the training loss had risen tenfold, or ``None``; ``largest_loss_ratio``; and
    loss, margins and test accuracy ``before`` and ``after``. A run that diverges has escaped, and
    has no ``after``.
    """

    kind = "switch"

    start: Solution
    lr: float
    batch_size: int | None
    steps: int = 1000
    seed: int = 0
    look_every: int = 10
    measure_every: int | None = None

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
        return samples * flops_per_sample(data.name, self.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Foretell, train, measure."""
        images = images_for(self.start.data, work)
        before = work.result(self.start)
        if before["outcome"] != "reached":
            raise ValueError(f"{self.start.id} has not reached a minimum: {before['outcome']}")
        n = len(images.x)
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
        model = self.start.model(work.place.device)
        model.load_state_dict(work.tensors(self.start))
        escaped_at, largest = self._go(model, images, work)
        after = None
        if evaluate(model, images) < math.inf:
            after = {"loss": evaluate(model, images), **self._measure(model, images)}
        return {
            "predicted": predicted,
            "why": said.why,
            "escaped_at": escaped_at,
            "largest_loss_ratio": largest,
            "before": before,
            "after": after,
        }

    def _go(self, model: nn.Module, images: Images, work: Work) -> tuple[int | None, float]:
        """Train; return when it escaped, and the largest loss relative to the first."""
        optimizer = stableopt.SGD(model.parameters(), lr=self.lr)
        first = evaluate(model, images)
        escaped_at, largest = None, 1.0
        batches = reshuffled_batches(
            images,
            self.batch_size or len(images.x),
            torch.Generator().manual_seed(self.seed),
        )
        work.trace(step=0, loss=first)
        for step, (x, y) in zip(range(1, self.steps + 1), batches, strict=False):
            optimizer.zero_grad()
            mean_squared_error(model(x), y).backward()
            optimizer.step()
            if step % self.look_every:
                continue
            loss = evaluate(model, images)
            work.progress(step / self.steps, f"η = {self.lr:g}, B = {self.batch_size}, {step:,}")
            record: dict[str, Any] = {"step": step, "loss": loss}
            if self.measure_every and step % self.measure_every == 0 and loss < math.inf:
                record.update(self._measure(model, images))
            work.trace(**record)
            if not loss < ESCAPED * first and escaped_at is None:
                escaped_at = step
            largest = max(largest, loss / first) if loss < math.inf else math.inf
            if not loss < math.inf:
                break
        return escaped_at, largest

    def _measure(self, model: nn.Module, images: Images) -> dict[str, Any]:
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            lr=self.lr,
            batch_size=self.batch_size or len(images.x),
            quantities=("sharpness", "non_uniformity"),
            max_iter=300,
        )
        return {
            "sharpness": margins.sharpness,
            "non_uniformity": margins.non_uniformity,
            "test_accuracy": images.accuracy(model),
        }
