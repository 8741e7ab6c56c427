"""`AlarmRules`: when the evidence of a run calls for a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from stableopt._support.arguments import positive, whole
from stableopt.recorder.evidence import Evidence, robust_score

__all__ = ["BLOCK", "Alarm", "AlarmRules"]

BLOCK = 5
"""Losses of batches are judged by means of so many, since a single one may be an odd batch. The rules
see what happened in the last so many steps, and are to be asked as often."""

_FEWEST = 8
"""Means, or measurements, with which one is compared; with fewer means the spread is not known."""

_ERRORS = 6.0
"""Standard errors of a mean of losses above the first ones. Those of single samples have long tails."""

_FAR = 0.5
"""Movement of a layer in one step, relative to its norm, that explains a loss which explodes at once."""


@dataclass(frozen=True)
class Alarm:
    """Something that calls for a report.

    Attributes:
        kind: ``"not finite"``, ``"loss"``, ``"ratio"`` or ``"realised edge"``.
        step: the step at which it was seen.
        text: what was seen, as a sentence without an end.
    """

    kind: str
    step: int
    text: str


@dataclass(frozen=True)
class AlarmRules:
    """What counts as a spike.

    Attributes:
        loss_score: robust standard deviations by which five losses of batches on average exceed
            those before; see :func:`~stableopt.recorder.evidence.robust_score`.
        loss_rise: the least rise of the loss that counts, as a share of the first loss of the run:
            near a minimum single samples make the losses of batches leap by less.
        loss_factor: the least factor between the loss and the median of the losses before; so many
            times the first loss of the run is a spike by itself, where the spread of the first losses
            does not explain it.
        ratio: (preconditioned) sharpness over its limit, where the loss on the probe set does not fall
            meanwhile. Runs at the edge of stability hover around 1, in full batches up to about 1.5,
            without harm, and a sharpness above its limit that training leaves behind is none either.
        patience: measurements in a row whose realised edge is above 1 by two standard errors.

    Raises:
        ValueError: for numbers that are not positive.
    """

    loss_score: float = 8.0
    loss_rise: float = 0.1
    loss_factor: float = 2.0
    ratio: float = 1.5
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("loss_score", "loss_rise", "loss_factor", "ratio"):
            positive(name, getattr(self, name))
        whole("patience", self.patience)

    def alarm(self, evidence: Evidence) -> Alarm | None:
        """Return the first alarm that the end of the evidence gives, or ``None``.

        >>> from stableopt.recorder import StepRecord
        >>> steps = [StepRecord(k, 0.1, loss=1.0 if k < 50 else 4.0) for k in range(55)]
        >>> AlarmRules().alarm(Evidence(steps, [], first_loss=2.0)).kind
        'loss'
        """
        for rule in (self._not_finite, self._ratio, self._loss, self._probe_loss, self._realised):
            found = rule(evidence)
            if found is not None:
                return found
        return None

    def _not_finite(self, evidence: Evidence) -> Alarm | None:
        for its in evidence.steps[-BLOCK:]:
            loss = 0.0 if its.loss is None else its.loss
            if not math.isfinite(loss):
                return Alarm("not finite", its.step, f"the loss of the batch is {loss}")
            for layer, norm in its.grad_norms.items():
                if not math.isfinite(norm):
                    return Alarm("not finite", its.step, f"the gradient of {layer} is not finite")
        last = evidence.measured[-1].margins if evidence.measured else None
        if last is not None and (last.failure or "").startswith("not finite"):
            return Alarm("not finite", last.step, f"the probe set is measured as {last.failure}")
        return None

    def _ratio(self, evidence: Evidence) -> Alarm | None:
        if not evidence.measured:
            return None
        *before, last = evidence.measured
        if last.ratio is None or last.ratio <= self.ratio:
            return None
        losses = [its.margins.loss for its in before if its.margins.loss is not None]
        usual = losses[-1] if losses else evidence.first_loss
        if last.margins.loss is not None and usual is not None and last.margins.loss <= usual:
            return None  # or it is the first loss that is known
        return Alarm(
            "ratio", last.step, f"the sharpness is {last.ratio:.3g} times what the step allows"
        )

    def _loss(self, evidence: Evidence) -> Alarm | None:
        losses = [(its.step, its.loss) for its in evidence.steps if its.loss is not None]
        blocks = [
            sum(loss / BLOCK for _, loss in losses[end - BLOCK : end])  # no sum can overflow
            for end in range(len(losses), BLOCK - 1, -BLOCK)
        ][::-1]
        first, name = evidence.first_loss, "the batches' loss"
        high = blocks and first is not None and blocks[-1] > self.loss_factor * first > 0
        if high and first is not None and self._beyond_noise(evidence, blocks[-1] - first):
            text = f"{name} is {blocks[-1]:.3g}, above the {first:.3g} at the start"
            return Alarm("loss", losses[-1][0], text)
        if len(blocks) <= _FEWEST:
            return None
        return self._rise(blocks, losses[-1][0], first, name)

    @staticmethod
    def _beyond_noise(evidence: Evidence, rise: float) -> bool:
        """Whether a rise above the first losses is more than their spread explains."""
        if math.isfinite(evidence.first_spread):
            return rise > _ERRORS * evidence.first_spread / math.sqrt(BLOCK)
        # The spread is not known yet: losses explode where weights do.
        return any(by > _FAR for its in evidence.steps for by in its.moved.values())

    def _probe_loss(self, evidence: Evidence) -> Alarm | None:
        known = [its for its in evidence.measured if its.margins.loss is not None]
        losses = [float(its.margins.loss or 0.0) for its in known]
        if len(losses) < 3:
            return None
        return self._rise(losses, known[-1].step, evidence.first_loss, "the loss on the probe set")

    def _rise(
        self, losses: Sequence[float], step: int, first: float | None, name: str
    ) -> Alarm | None:
        # The recent ones alone: with those of the first descent among them, the spread is too wide.
        before, last = losses[-_FEWEST - 1 : -1], losses[-1]
        usual, start = median(before), first if first is not None else losses[0]
        high = (
            robust_score(last, before) > self.loss_score
            and last - usual > self.loss_rise * abs(start)
            and last > self.loss_factor * usual
        )
        return Alarm("loss", step, f"{name} rose from {usual:.3g} to {last:.3g}") if high else None

    def _realised(self, evidence: Evidence) -> Alarm | None:
        last = [its.margins for its in evidence.measured[-self.patience :]]
        if len(last) < self.patience:
            return None
        for margins in last:
            found = margins.results.get("realised_edge")
            if found is None or found.value is None:
                return None
            error = found.measurement.residual * abs(found.value) if found.measurement else 0.0
            if found.value - 2 * error <= 1:
                return None
        return Alarm(
            "realised edge",
            last[-1].step,
            f"the last {self.patience} measured steps raised the loss instead of lowering it",
        )
