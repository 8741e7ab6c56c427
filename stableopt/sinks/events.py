"""`Measured` and `Decided`: the events that monitors and steering send to sinks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.region import StabilityRegion
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["Decided", "Decision", "Event", "Measured"]


class Decision(Protocol):
    """What sinks read of a decision; :class:`stableopt.steering.Decision` is one.

    Its ``str`` is the reason in words.
    """

    def record(self) -> dict[str, float]:
        """Return the numbers of the decision by name."""


@dataclass(frozen=True)
class Measured:
    """A measurement, failed ones included.

    Attributes:
        step: optimizer steps done.
        margins: what was measured.
        rule: the update rule at that step; ``None`` where it could not be read.
    """

    step: int
    margins: StabilityMargins
    rule: UpdateRule | None = None

    def record(self) -> dict[str, float]:
        """Return every known number by name: :meth:`StabilityMargins.record`."""
        return self.margins.record()

    @property
    def region(self) -> StabilityRegion | None:
        """The rule's stability region; ``None`` where rule, preconditioner or noise limit are unknown.

        With a preconditioner it is the region of the preconditioned quantities. The preconditioner
        itself is left out, so that a sink that keeps the region keeps no tensors.

        >>> margins = StabilityMargins(batch_size=4)
        >>> Measured(1, margins, UpdateRule(lr=0.5, momentum=0.5)).region.max_sharpness
        6.0
        """
        rule = self.rule
        if rule is None or rule.unknown is not None or not rule.noise_known:
            return None
        if rule.preconditioned:
            # In these coordinates weight decay is part of the matrix, not of the limit.
            rule = replace(
                rule, preconditioner=None, group_lrs=(), group_weight_decays=(), weight_decay=0.0
            )
        return StabilityRegion(rule, self.margins.batch_size, self.margins.dataset_size)


@dataclass(frozen=True)
class Decided:
    """A decision of a learning-rate scheduler or controller.

    Attributes:
        step: optimizer steps done.
        decision: what was decided, and why.
    """

    step: int
    decision: Decision

    def record(self) -> dict[str, float]:
        """Return the numbers of the decision by name; ``decision`` is 1."""
        return self.decision.record()


Event: TypeAlias = Measured | Decided
