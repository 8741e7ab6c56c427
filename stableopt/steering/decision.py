"""`Decision`: a decision of steering with its reason; `DecisionLog`: the latest decisions."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["REMEMBERED", "Decision", "DecisionLog", "Kind", "What", "kind_of_change", "marks"]

REMEMBERED = 10_000
"""Decisions in the log of a scheduler or controller."""

What = Literal["lr", "batch_size", "weights", "target"]
Kind = Literal[
    "raise", "lower", "hold", "cut", "keep", "restore", "kick", "reached", "unreachable", "missed"
]


@dataclass(frozen=True)
class Decision:
    """One decision of a law, a scheduler or a controller.

    Attributes:
        what: the subject: the learning rate ``"lr"``, ``"batch_size"``, ``"weights"`` or ``"target"``.
        kind: ``"raise"``, ``"lower"``; ``"cut"`` after a failure; ``"hold"`` while waiting; ``"keep"``
            if no change is needed; ``"restore"`` or ``"kick"`` of weights; for the target
            ``"reached"``, ``"missed"`` after it was reached, or ``"unreachable"``.
        old: the value before.
        new: the value after; equal to ``old`` if nothing changes.
        why: the reason, as a sentence.
        measured: the measured value that the decision is based on; ``None`` if not known.
        limit: the number that ``measured`` was compared with.
        step: optimizer steps done.
        dry_run: whether it was only recorded and not carried out.

    >>> Decision("lr", "raise", 0.1, 0.101, "the ratio is below the gate").changes
    True
    """

    what: What
    kind: Kind
    old: float
    new: float
    why: str
    measured: float | None = None
    limit: float | None = None
    step: int = 0
    dry_run: bool = False

    @property
    def changes(self) -> bool:
        """Whether the value changes."""
        return self.old != self.new

    @property
    def label(self) -> str:
        """What is done to what, as in ``"raise lr"``: the label of a mark in a figure."""
        return f"{self.kind} {self.what.replace('_', ' ')}"

    def __str__(self) -> str:
        change = f"{self.old:.4g} → {self.new:.4g}" if self.changes else f"{self.new:.4g}"
        mode = " (dry run)" if self.dry_run else ""
        return f"step {self.step}: {self.kind} {self.what} {change}{mode}: {self.why}"

    def record(self) -> dict[str, float]:
        """Return the numbers for a sink by name; ``decision`` tells it from a measurement.

        >>> Decision("lr", "cut", 0.1, 0.07, "the loss is nan").record()
        {'decision': 1.0, 'lr_from': 0.1, 'lr_to': 0.07}
        """
        numbers = {
            "decision": 1.0,
            f"{self.what}_from": self.old,
            f"{self.what}_to": self.new,
            "measured": self.measured,
            "limit": self.limit,
        }
        return {name: float(value) for name, value in numbers.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for checkpoints; :meth:`from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Decision:
        """Return the decision that :meth:`to_dict` wrote."""
        return cls(**state)


def kind_of_change(kind: Kind, old: float, new: float) -> Kind:
    """Return ``kind``, or the kind of the actual change if bounds prevented or reversed it.

    >>> kind_of_change("raise", 64, 64), kind_of_change("lower", 8, 16), kind_of_change("cut", 8, 4)
    ('hold', 'raise', 'cut')
    """
    if new > old:
        return "raise"
    if new < old:
        return "cut" if kind == "cut" else "lower"
    return "hold" if kind in ("raise", "lower") else kind


class DecisionLog(deque[Decision]):
    """The latest decisions, at most ``maxlen``, oldest first."""

    def latest(self, what: str) -> Decision | None:
        """Return the latest decision about ``what``."""
        return next((decision for decision in reversed(self) if decision.what == what), None)

    def repeats(self, decision: Decision) -> bool:
        """Return whether the latest decision on the same subject has the same words, up to numbers."""
        last = self.latest(decision.what)
        return last is not None and _words(last) == _words(decision)

    def state(self) -> list[dict[str, Any]]:
        """Return plain values, for checkpoints; :meth:`read` reads them."""
        return [decision.to_dict() for decision in self]

    @staticmethod
    def read(state: Iterable[Mapping[str, Any]]) -> list[Decision]:
        """Return the decisions of a :meth:`state`."""
        return [Decision.from_dict(entry) for entry in state]

    def replace(self, decisions: Iterable[Decision]) -> None:
        """Replace the decisions by others."""
        self.clear()
        self.extend(decisions)


def _words(decision: Decision) -> tuple[str, str]:
    return decision.kind, re.sub(r"[-+.\d]+(e[-+]?\d+)?", "", decision.why)


def marks(decisions: Iterable[Decision]) -> list[tuple[float, str]]:
    """Return ``(step, label)`` of the decisions for :mod:`stableopt.plot`, without repeated kinds.

    >>> up = [Decision("lr", "raise", 0.1, 0.2, "", step=t) for t in (1, 2, 3)]
    >>> marks([*up, Decision("lr", "hold", 0.2, 0.2, "", step=4)])
    [(1, 'raise lr'), (4, 'hold lr')]
    """
    latest_kind: dict[str, str] = {}
    labels: list[tuple[float, str]] = []
    for decision in decisions:
        if latest_kind.get(decision.what) != decision.kind:
            latest_kind[decision.what] = decision.kind
            labels.append((decision.step, decision.label))
    return labels
