"""One case of the escape experiment: what is run, what is predicted of it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stableopt import StabilityMargins

__all__ = ["ESCAPED", "Config", "Prediction", "Trace", "predict"]

ESCAPED = 10.0
"""SGD has left when the training loss has risen by this factor: noise around a stable minimum makes
it rise two- to fourfold, an escape thirtyfold and more."""


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for logs and figures.
        seed: of the initialisation and the batches.
        n: training images.
        random_labels: how many of them get a random label.
        lr: learning rate of GD and SGD.
        target_loss: training loss at which GD stops.
        batch_sizes: of the SGD runs.
        steps: of each SGD run.
        measure_every: SGD steps between measurements.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("runs/escape")
    seed: int = 0
    n: int = 1000
    random_labels: int = 0
    lr: float = 0.5
    target_loss: float = 3e-4
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    steps: int = 1000
    measure_every: int = 100


@dataclass(frozen=True)
class Prediction:
    """What the box says of one batch size, from margins measured at the minimum."""

    escapes: bool
    why: str


@dataclass(frozen=True)
class Trace:
    """One SGD run from the minimum.

    Attributes:
        prediction: what was said before it.
        history: margins at the minimum and along the way.
        steps: where the loss was looked at.
        losses: the training loss there.
        accuracy: test accuracy at the end.
    """

    prediction: Prediction
    history: list[StabilityMargins]
    steps: list[int]
    losses: list[float]
    accuracy: float

    @property
    def batch_size(self) -> int:
        """Samples in a step."""
        assert self.history[0].batch_size is not None
        return self.history[0].batch_size

    @property
    def escaped_at(self) -> int | None:
        """The first step at which the loss had risen tenfold; a loss that is not finite has."""
        risen = (
            step
            for step, loss in zip(self.steps, self.losses, strict=True)
            if not loss < ESCAPED * self.losses[0]
        )
        return next(risen, None)

    @property
    def right(self) -> bool:
        """Whether it did what was predicted."""
        return self.prediction.escapes == (self.escaped_at is not None)


def predict(margins: StabilityMargins) -> Prediction:
    """Say from measured margins whether SGD will leave: the box (9).

    Raises:
        ValueError: for margins in which something is missing.
    """
    a, a_max = margins.sharpness, margins.sharpness_limit
    s, s_max = margins.non_uniformity, margins.non_uniformity_limit
    if a is None or s is None or a_max is None or s_max is None:
        raise ValueError(f"margins were not measured: {margins.failure}")
    if a > a_max:
        return Prediction(True, f"a = {a:.2f} > 2/η = {a_max:.2f}: unstable, will escape")
    if s > s_max:
        return Prediction(True, f"s = {s:.2f} > √B/η = {s_max:.2f}: unstable, will escape")
    return Prediction(
        False, f"a = {a:.2f} ≤ {a_max:.2f} and s = {s:.2f} ≤ {s_max:.2f}: stable, will stay"
    )
