"""`Verdict`: the likely cause of an alarm, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Cause", "Verdict"]

Cause: TypeAlias = Literal[
    "learning rate", "weights", "batch", "batch size", "layer", "edge", "not finite", "unknown"
]
"""The causes that a :class:`Verdict` can name."""

_ADVICE: dict[Cause, str] = {
    "learning rate": "Lower the peak of the learning rate, or warm up longer.",
    "weights": "Find the code outside the optimizer that wrote the weights.",
    "batch size": "Raise the batch size, or lower the learning rate with it.",
    "batch": (
        "Look at these samples. Resume from a checkpoint before them and skip them. Clipping helps if"
        " their gradient is finite."
    ),
    "layer": (
        "If the layer's weights started too large, initialise them smaller, or give its group a lower"
        " learning rate. Otherwise lower the learning rate (with Adam also β₂), or warm up longer."
    ),
    "edge": "Lower the learning rate (with Adam also β₂), or warm up longer.",
    "not finite": (
        "Resume from the last checkpoint, and look for an overflow in the loss or in half precision."
    ),
    "unknown": (
        "Resume from the last checkpoint and skip the data since then. If it recurs, lower the learning"
        " rate."
    ),
}


@dataclass(frozen=True)
class Verdict:
    """The likely cause of an alarm.

    Attributes:
        cause: one of :data:`Cause`.
        text: the explanation, one or more sentences.
        layer: the layer where the cause is, or ``None`` if unknown.
        step: the step at which it began, or ``None`` if unknown.

    >>> Verdict("learning rate", "The loss rose.").advice
    'Lower the peak of the learning rate, or warm up longer.'
    """

    cause: Cause
    text: str
    layer: str | None = None
    step: int | None = None

    @property
    def advice(self) -> str:
        """What to do about the cause."""
        return _ADVICE[self.cause]
