"""`Measured` and `Decided`: the events that monitors and steering send to sinks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.region import StabilityRegion
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["Decided", "Decision", "Event", "Measured"]


class Decision(Protocol):
    """The part of :class:`stableopt.steering.Decision` that sinks use.

    ``str(decision)`` is the reason in words.
    """

    @property
    def label(self) -> str:
        """What is done to what, such as ``"raise lr"``."""

    @property
    def changes(self) -> bool:
        """Whether the value changes."""

    def record(self) -> dict[str, float]:
        """Return the numbers of the decision by name."""


@dataclass(frozen=True)
class Measured:
    """A measurement, failed ones included.

    Attributes:
        step: optimizer steps done.
        margins: the measured values.
        rule: the update rule at that step; ``None`` if it could not be read.
    """

    step: int
    margins: StabilityMargins
    rule: UpdateRule | None = None

    def record(self) -> dict[str, float]:
        """Return every known number by name: :meth:`StabilityMargins.record`."""
        return self.margins.record()

    @property
    def region(self) -> StabilityRegion | None:
        """The rule's stability region; ``None`` if rule, preconditioner or noise limit are unknown.

        With a preconditioner it is the region of the preconditioned quantities. It does not refer to
        the preconditioner, so a sink that stores the region holds no tensors.

        >>> margins = StabilityMargins(batch_size=4)
        >>> Measured(1, margins, UpdateRule(lr=0.5, momentum=0.5)).region.max_sharpness
        6.0
        """
        rule = self.rule
        if rule is None or rule.unknown is not None or not rule.noise_known:
            return None
        if rule.preconditioned:
            # In preconditioned coordinates the matrix contains the weight decay, not the limit.
            rule = replace(
                rule,
                preconditioner=None,
                weight_decay=0.0,
                group_lrs=(),
                group_weight_decays=(),
                group_filtered_decays=(),
            )
        return StabilityRegion(rule, self.margins.batch_size, self.margins.dataset_size)


@dataclass(frozen=True)
class Decided:
    """A decision of a learning-rate scheduler or controller.

    Attributes:
        step: optimizer steps done.
        decision: the change and its reason.
    """

    step: int
    decision: Decision

    def record(self) -> dict[str, float]:
        """Return the numbers of the decision by name; ``decision`` is 1."""
        return self.decision.record()


Event: TypeAlias = Measured | Decided
