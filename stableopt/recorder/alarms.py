"""`AlarmRules`: the conditions under which the flight recorder writes a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, TypeAlias

from stableopt._support.arguments import positive, whole
from stableopt.recorder.evidence import Evidence, robust_score

__all__ = ["BLOCK", "Alarm", "AlarmRules"]

BLOCK = 5
"""Batch losses averaged into one block, since a single one may be an odd batch. The rules look at the
last block, so call them at least once per block of steps."""

_HISTORY = 8
"""Earlier block means with which the last is compared; fewer do not show the spread. Measurements are
compared with at most as many."""

_ERRORS = 6.0
"""Standard errors by which a block mean must exceed the loss at the start: losses have long tails."""

_EXPLOSIVE_MOVE = 0.5
"""Relative movement of a layer in one step that explains a loss which explodes at once."""


Kind: TypeAlias = Literal["not finite", "loss", "ratio", "realised edge"]
"""The events that trigger a report."""


@dataclass(frozen=True)
class Alarm:
    """An event that triggers a report.

    Attributes:
        kind: one of :data:`Kind`.
        step: the step at which the event was detected.
        text: the event, as a sentence without capital and full stop.
    """

    kind: Kind
    step: int
    text: str


@dataclass(frozen=True)
class AlarmRules:
    """What counts as a spike.

    Attributes:
        loss_score: robust standard deviations by which the mean of five batch losses exceeds the means
            before; see :func:`~stableopt.recorder.evidence.robust_score`.
        loss_rise: the smallest rise of the loss that counts, as a share of the loss at the start. Near
            a minimum single samples make batch losses jump by less.
        loss_factor: the smallest factor between the loss and the median of the losses before. A loss
            above this factor times the loss at the start is a spike by itself, unless the spread of
            the first losses explains it. If the run starts at almost zero, no rise counts.
        ratio: the (preconditioned) sharpness over its limit above which an alarm is raised, unless the
            loss on the probe set falls. Ratios around 1, and with full batches up to about 1.5, are
            harmless: training at the edge of stability has them.
        patience: the number of consecutive measurements whose realised edge exceeds 1 by two standard
            errors.

    Raises:
        ValueError: for numbers that are not positive, and a ``loss_factor`` of at most 1.
    """

    loss_score: float = 8.0
    loss_rise: float = 0.1
    loss_factor: float = 2.0
    ratio: float = 1.5
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("loss_score", "loss_rise", "loss_factor", "ratio"):
            positive(name, getattr(self, name))
        if not self.loss_factor > 1:
            raise ValueError(f"loss_factor={self.loss_factor}: expected a factor above 1")
        whole("patience", self.patience)

    def alarm(self, evidence: Evidence) -> Alarm | None:
        """Return the alarm of the first rule that the latest evidence meets, or ``None``.

        >>> from stableopt.recorder import StepRecord
        >>> steps = [StepRecord(k, 0.1, loss=1.0 if k < 50 else 4.0) for k in range(55)]
        >>> AlarmRules().alarm(Evidence(steps, [], first_loss=2.0)).kind
        'loss'
        """
        for rule in (self._not_finite, self._ratio, self._loss, self._probe_loss, self._realised):
            alarm = rule(evidence)
            if alarm is not None:
                return alarm
        return None

    def _not_finite(self, evidence: Evidence) -> Alarm | None:
        for record in evidence.steps[-BLOCK:]:
            step, loss = record.step, record.loss
            if loss is not None and not math.isfinite(loss):
                return Alarm("not finite", step, f"the loss of the batch is {loss}")
            for layer, norm in record.grad_norms.items():
                if not math.isfinite(norm):
                    return Alarm("not finite", step, f"the gradient of {layer} is not finite")
        last = evidence.measured[-1].margins if evidence.measured else None
        if last is not None and (last.failure or "").startswith("not finite"):
            return Alarm(
                "not finite", last.step, f"the measurement on the probe set is {last.failure}"
            )
        return None

    def _ratio(self, evidence: Evidence) -> Alarm | None:
        if not evidence.measured:
            return None
        *before, last = evidence.measured
        if last.ratio is None or last.ratio <= self.ratio:
            return None
        losses = [record.margins.loss for record in before if record.margins.loss is not None]
        reference = losses[-1] if losses else evidence.first_loss
        loss = last.margins.loss
        # The first known loss is its own reference.
        if loss is not None and reference is not None and loss <= reference:
            return None
        return Alarm("ratio", last.step, f"the sharpness is {last.ratio:.3g} times its limit")

    def _loss(self, evidence: Evidence) -> Alarm | None:
        if evidence.starts_at_zero:
            return None
        losses = [
            (record.step, record.loss) for record in evidence.steps if record.loss is not None
        ]
        # Blocks are counted back from the last loss. To divide before the sum avoids an overflow.
        means = [
            sum(loss / BLOCK for _, loss in losses[end - BLOCK : end])
            for end in range(len(losses), BLOCK - 1, -BLOCK)
        ][::-1]
        if not means:
            return None
        step, mean, first, name = losses[-1][0], means[-1], evidence.first_loss, "the batches' loss"
        high = first is not None and mean > self.loss_factor * first > 0
        if high and first is not None and self._beyond_noise(evidence, mean - first):
            return Alarm("loss", step, f"{name} is {mean:.3g}, above the {first:.3g} at the start")
        return self._rise(means, step, first, name) if len(means) > _HISTORY else None

    @staticmethod
    def _beyond_noise(evidence: Evidence, rise: float) -> bool:
        """Return whether the spread of the first losses does not explain a rise above them."""
        if math.isfinite(evidence.first_spread):
            return rise > _ERRORS * evidence.first_spread / math.sqrt(BLOCK)
        # Without a known spread, weights that moved far tell an explosion from noise.
        return any(
            length > _EXPLOSIVE_MOVE
            for record in evidence.steps
            for length in record.moved.values()
        )

    def _probe_loss(self, evidence: Evidence) -> Alarm | None:
        records = [record for record in evidence.measured if record.margins.loss is not None]
        losses = [float(record.margins.loss or 0.0) for record in records]
        if len(losses) < 3 or evidence.starts_at_zero:
            return None
        first, step = evidence.first_loss, records[-1].step
        return self._rise(losses, step, first, "the loss on the probe set")

    def _rise(
        self, losses: Sequence[float], step: int, first: float | None, name: str
    ) -> Alarm | None:
        # Only recent losses: those of the first descent would widen the spread.
        before, last = losses[-_HISTORY - 1 : -1], losses[-1]
        usual, start = median(before), first if first is not None else losses[0]
        if (
            robust_score(last, before) > self.loss_score
            and last - usual > self.loss_rise * abs(start)
            and last > self.loss_factor * usual
        ):
            return Alarm("loss", step, f"{name} rose from {usual:.3g} to {last:.3g}")
        return None

    def _realised(self, evidence: Evidence) -> Alarm | None:
        last = [record.margins for record in evidence.measured[-self.patience :]]
        if len(last) < self.patience:
            return None
        for margins in last:
            edge = margins.results.get("realised_edge")
            if edge is None or edge.value is None:
                return None
            error = 0.0 if edge.measurement is None else edge.measurement.absolute_error
            if edge.value - 2 * error <= 1:
                return None
        return Alarm(
            "realised edge",
            last[-1].step,
            f"the realised edge is above 1 in {self.patience} measurements in a row: the loss rises",
        )
