"""`Evidence`: the last steps and measurements of a run, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from stableopt._support.arguments import require_keys
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
"""Batch losses averaged for the loss at the start: one loss of a small batch is too noisy."""

_ZERO_LOSS = 1e-6
"""Loss that is zero up to the rounding of a mean of advantages, in single precision."""


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimizer.

    Attributes:
        step: its number, from 1.
        lr: the largest learning rate among the groups.
        loss: the loss of the batch, if the training loop reports it.
        grad_norms: the norm of each layer's gradient; empty for a step that a gradient scaler skips.
        batch: identifiers of the samples, if the training loop reports them.
        lrs: the learning rate of each group, if they differ.
        moved: the length of the step in each layer relative to the norm of its weights, for layers
            that moved by 5 % or more.
        changed: the factor by which something other than the optimizers changed the norm of a layer's
            weights since the step before, for layers with a factor of at least 1.5 or at most 1/1.5.
        total_norm: the norm of the whole gradient before clipping, if the training loop reports it.
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
        """The norm of the whole gradient that the optimizer received, after any clipping.

        >>> StepRecord(1, 0.1, grad_norms={"0": 3.0, "2": 4.0}).grad_norm
        5.0
        """
        return math.hypot(*self.grad_norms.values())


@dataclass(frozen=True)
class MeasuredRecord:
    """One measurement.

    Attributes:
        margins: the measured values.
        shares: the share of each layer in the top eigenvector, the largest first.
    """

    margins: StabilityMargins
    shares: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, margins: StabilityMargins) -> MeasuredRecord:
        """Return the record of ``margins``, with the shares in ``margins.layers``."""
        layers = margins.layers
        largest = () if layers is None else layers.largest(len(layers), by="share")
        return cls(margins, {layer.name: layer.share or 0.0 for layer in largest})

    @property
    def step(self) -> int:
        """The number of steps done before the measurement."""
        return self.margins.step

    @property
    def ratio(self) -> float | None:
        """The sharpness over its limit; with a preconditioner the preconditioned sharpness."""
        return self.margins.edge_ratio


@dataclass(frozen=True)
class Evidence:
    """The basis of a report: steps and measurements, oldest first.

    Attributes:
        steps: the last steps.
        measured: the last measurements.
        first_loss: the loss at the start of the run, or ``None``: see :func:`first_level`.
        first_gains: for each layer with a weight matrix, the root mean square of its weights times the
            root of the number of inputs, when recording began: about 1 for usual initialisations.
        groups: the layers of each parameter group.
        precision: the machine epsilon of the gradients.
        first_losses: the first finite batch losses, up to 20.
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
        """The standard deviation of the first losses; infinite for fewer than 20, and 0 for none.

        >>> Evidence([], []).first_spread, Evidence([], [], first_losses=[1.0]).first_spread
        (0.0, inf)
        """
        if not self.first_losses:
            return 0.0
        return stdev(self.first_losses) if len(self.first_losses) >= FIRST_LOSSES else math.inf

    @property
    def starts_at_zero(self) -> bool:
        """Whether the first loss is zero up to rounding, and later ones are not: a rise says nothing.

        The loss of a policy on its own samples is minus the mean of its advantages, which is zero. It
        grows as the policy learns.

        >>> Evidence([], [], first_losses=[1e-9, -1e-4, 5e-4]).starts_at_zero
        True
        """
        sizes = [abs(loss) for loss in self.first_losses]
        return bool(sizes) and sizes[0] < min(_ZERO_LOSS, 1e-3 * sum(sizes) / len(sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dicts."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "measured": [
                {"margins": record.margins.to_dict(), "shares": dict(record.shares)}
                for record in self.measured
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

        >>> measured = [MeasuredRecord(StabilityMargins(step=1))]
        >>> evidence = Evidence([StepRecord(1, 0.1)], measured, groups=[])
        >>> Evidence.from_dict(evidence.to_dict()) == evidence
        True
        """
        require_keys(state, ("steps", "measured", "first_loss", "first_gains"), name="evidence")
        return cls(
            [StepRecord(**step) for step in state["steps"]],
            [
                MeasuredRecord(StabilityMargins.from_dict(record["margins"]), record["shares"])
                for record in state["measured"]
            ],
            state["first_loss"],
            state["first_gains"],
            state.get("groups", ()),  # states of older versions end here
            state.get("precision", 0.0),
            tuple(state.get("first_losses", ())),
        )


def finite_or_inf(value: float) -> float:
    """Return ``value``, or infinity if it is NaN or infinite, so that it compares as the largest.

    >>> finite_or_inf(2.0), finite_or_inf(float("nan"))
    (2.0, inf)
    """
    return value if math.isfinite(value) else math.inf


def first_level(losses: Sequence[float], probe: float | None = None) -> float | None:
    """Return the loss at the start of a run: the mean of the first 20 batch losses.

    Until there are 20, it is the first one.

    Args:
        losses: the first finite batch losses.
        probe: the loss on the probe set, returned without batch losses.

    >>> first_level([3.0, 1.0]), first_level([3.0, 1.0] * 10), first_level([], 2.0)
    (3.0, 2.0, 2.0)
    """
    if not losses:
        return probe
    return fmean(losses) if len(losses) >= FIRST_LOSSES else losses[0]


def robust_score(value: float, before: Sequence[float]) -> float:
    r"""Return by how many robust standard deviations ``value`` exceeds the values before it.

    The centre is the median. The standard deviation is 1.4826 times the smaller of two estimates: the
    median absolute deviation, and the median absolute difference of neighbours over :math:`\sqrt2`,
    which a trend does not widen. For independent normal values either is consistent. The standard
    deviation is at least a hundredth of the centre.

    >>> round(robust_score(2.0, [1.0, 1.1, 0.9, 1.0, 1.2]), 1)
    6.7
    """
    centre = median(before)
    width = median(abs(earlier - centre) for earlier in before)
    if len(before) > 1:
        width = min(width, median(abs(b - a) for a, b in pairwise(before)) / math.sqrt(2))
    return (value - centre) / max(1.4826 * width, 0.01 * abs(centre), 1e-300)
