"""`Evidence`: the last steps and measurements of a run, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from stableopt.stability.measure.margins import StabilityMargins

__all__ = [
    "FIRST_LOSSES",
    "Evidence",
    "MeasuredRecord",
    "StepRecord",
    "finite_or_inf",
    "first_level",
    "robust_score",
]

FIRST_LOSSES = 20
"""Losses of batches that make the first level: with batches of one sample a single one says little."""


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimizer.

    Attributes:
        step: its number, from 1.
        lr: the largest learning rate among the groups.
        loss: of the batch, where the training loop reports it.
        grad_norms: the norm of the gradient of each layer that has one. None of a step that a gradient
            scaler skips.
        batch: what identifies the batch, where the training loop reports it.
        lrs: the learning rate of each group, where they differ.
        moved: how far the step moved the weights of a layer, relative to their norm. Only layers that
            moved by 5 % or more.
        changed: the factor by which something other than the optimizers has changed the norm of a
            layer's weights since the step before. Only layers with a factor of 1.5 or more, or less
            than its inverse.
        total_norm: the norm of the whole gradient before clipping, where the training loop reports it.
    """

    step: int
    lr: float
    loss: float | None = None
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    batch: Sequence[int] | None = None
    lrs: Sequence[float] = ()
    moved: Mapping[str, float] = field(default_factory=dict)
    changed: Mapping[str, float] = field(default_factory=dict)
    total_norm: float | None = None

    @property
    def grad_norm(self) -> float:
        """The norm of the whole gradient, as the optimizer saw it.

        >>> StepRecord(1, 0.1, grad_norms={"0": 3.0, "2": 4.0}).grad_norm
        5.0
        """
        return math.hypot(*self.grad_norms.values())


@dataclass(frozen=True)
class MeasuredRecord:
    """One measurement.

    Attributes:
        margins: what was measured.
        shares: the share of each layer in the top eigenvector, the largest first.
    """

    margins: StabilityMargins
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step after which it was made."""
        return self.margins.step

    @property
    def ratio(self) -> float | None:
        """The (preconditioned) sharpness over its limit."""
        return self.margins.edge_ratio


@dataclass(frozen=True)
class Evidence:
    """What a report is made from: steps and measurements, oldest first.

    Attributes:
        steps: the last steps.
        measured: the last measurements.
        first_loss: the loss at the start of the run, or ``None``: see :func:`first_level`.
        first_gains: for each layer with a matrix of weights, their root mean square times the root of
            the number of inputs, when recording began: about 1 for usual initialisations.
        groups: the layers of each of the optimizers' groups.
        precision: of the gradients, as a relative distance of neighbouring numbers.
        first_losses: the first finite losses of batches, up to 20.
    """

    steps: Sequence[StepRecord]
    measured: Sequence[MeasuredRecord]
    first_loss: float | None = None
    first_gains: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[Sequence[str]] = ()
    precision: float = 0.0
    first_losses: Sequence[float] = ()

    @property
    def first_spread(self) -> float:
        """The standard deviation of the first losses; infinite while they are too few, 0 without any.

        >>> Evidence([], []).first_spread, Evidence([], [], first_losses=[1.0]).first_spread
        (0.0, inf)
        """
        if not self.first_losses:
            return 0.0
        return stdev(self.first_losses) if len(self.first_losses) >= FIRST_LOSSES else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "measured": [
                {"margins": its.margins.to_dict(), "shares": dict(its.shares)}
                for its in self.measured
            ],
            "first_loss": self.first_loss,
            "first_gains": dict(self.first_gains),
            "groups": [list(layers) for layers in self.groups],
            "precision": self.precision,
            "first_losses": list(self.first_losses),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Evidence:
        """Return the evidence that :meth:`to_dict` wrote.

        >>> known = Evidence([StepRecord(1, 0.1)], [MeasuredRecord(StabilityMargins(step=1))], groups=[])
        >>> Evidence.from_dict(known.to_dict()) == known
        True
        """
        return cls(
            [StepRecord(**step) for step in state["steps"]],
            [
                MeasuredRecord(StabilityMargins.from_dict(its["margins"]), its["shares"])
                for its in state["measured"]
            ],
            state["first_loss"],
            state["first_gains"],
            state.get("groups", ()),  # which older versions lack
            state.get("precision", 0.0),
            tuple(state.get("first_losses", ())),
        )


def finite_or_inf(value: float) -> float:
    """Return ``value``, or infinity where it is not finite, so that it compares as the largest.

    >>> finite_or_inf(2.0), finite_or_inf(float("nan"))
    (2.0, inf)
    """
    return value if math.isfinite(value) else math.inf


def first_level(losses: Sequence[float], probe: float | None = None) -> float | None:
    """Return the loss at the start of a run: the mean of the first 20 of batches, until then the first.

    Args:
        losses: of batches, those that are finite.
        probe: the loss on the probe set, where there are none of batches.

    >>> first_level([3.0, 1.0]), first_level([3.0, 1.0] * 10), first_level([], 2.0)
    (3.0, 2.0, 2.0)
    """
    if not losses:
        return probe
    return fmean(losses) if len(losses) >= FIRST_LOSSES else losses[0]


def robust_score(value: float, before: Sequence[float]) -> float:
    """Return by how many robust standard deviations ``value`` is above those before it.

    The centre is the median. The width is 1.4826 times the median absolute deviation, or the median
    absolute difference of neighbours over the root of 2 times that if it is less: both are the standard
    deviation of independent normal values, and the second one is not widened by a trend. A hundredth of
    the centre is the least.

    >>> round(robust_score(2.0, [1.0, 1.1, 0.9, 1.0, 1.2]), 1)
    6.7
    """
    centre = median(before)
    width = median(abs(one - centre) for one in before)
    if len(before) > 1:
        width = min(width, median(abs(b - a) for a, b in pairwise(before)) / math.sqrt(2))
    return (value - centre) / max(1.4826 * width, 0.01 * abs(centre), 1e-300)
