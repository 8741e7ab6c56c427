"""`Run`: the measurements, decisions and flight reports of a run, as its page shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stableopt.stability.measure.margins import StabilityMargins

__all__ = ["FlightReport", "Record", "Run", "number"]

Record = Mapping[str, Any]
"""A measurement: its ``step``, and numbers by name, as :class:`~stableopt.JSONLinesSink` writes them."""


class MeasuredBefore(NamedTuple):
    """A measurement before an alarm.

    Attributes:
        step: the step.
        loss: the loss on the probe set.
        ratio: the (preconditioned) sharpness over its limit.
        shares: the share of each layer in the top eigenvector.
    """

    step: int
    loss: float
    ratio: float
    shares: Mapping[str, float]


@dataclass(frozen=True)
class FlightReport:
    """A report of the flight recorder.

    Attributes:
        step: the step of the alarm.
        alarm: the event.
        cause: its likely cause.
        layer: the layer where the cause is, or ``""``.
        verdict: the explanation, one or more sentences.
        steps: the steps before, oldest first.
        measured: the measurements before.
    """

    step: int
    alarm: str
    cause: str
    layer: str
    verdict: str
    steps: Sequence[Record]
    measured: Sequence[MeasuredBefore]

    @classmethod
    def of(cls, content: Any) -> FlightReport:
        """Return the report with the ``content`` of a ``report.json``.

        Raises:
            AttributeError, KeyError, OverflowError, TypeError, ValueError: if it is of another form.
        """
        alarm, verdict, evidence = (content[key] for key in ("alarm", "verdict", "evidence"))
        measured = []
        for record in evidence["measured"]:
            margins = StabilityMargins.from_dict(record["margins"])
            shares = {str(name): _share(share) for name, share in record["shares"].items()}
            loss, ratio = number(margins.loss), number(margins.edge_ratio)
            measured.append(MeasuredBefore(_step(margins.step), loss, ratio, shares))
        return cls(
            _step(alarm["step"]),
            str(alarm["text"]),
            str(verdict["cause"]),
            str(verdict["layer"] or ""),
            str(verdict["text"]),
            [{**record, "step": _step(record["step"])} for record in evidence["steps"]],
            measured,
        )


@dataclass(frozen=True)
class Run:
    """The measurements, decisions and reports of a run.

    Attributes:
        name: the title of the page.
        records: the measurements, in the order of their steps.
        decisions: the decisions of steering, as step and reason.
        reports: the reports of the flight recorder, oldest first.
        unreadable: the number of lines and reports that could not be read, as after a crash.
        superseded: the number of measurements, decisions and reports that were replaced by a run which
            was resumed at an earlier step, or started again.
        skipped: files that were not read, each with the reason.
    """

    name: str
    records: Sequence[Record] = ()
    decisions: Sequence[tuple[int, str]] = ()
    reports: Sequence[FlightReport] = ()
    unreadable: int = 0
    superseded: int = 0
    skipped: Sequence[str] = ()

    @classmethod
    def of_history(cls, name: str, history: Iterable[StabilityMargins]) -> Run:
        """Return the run of a monitor's ``history``.

        >>> Run.of_history("demo", [StabilityMargins(step=3, sharpness=1.0)]).records[0]["sharpness"]
        1.0
        """
        return cls(name, [_record(margins) for margins in history])

    @property
    def failed(self) -> int:
        """The number of failed measurements."""
        return sum(number(record.get("failed")) == 1 for record in self.records)

    @property
    def shares(self) -> dict[int, Mapping[str, float]]:
        """The share of each layer in the top eigenvector, by step; steps without shares are left out."""
        by_step: dict[int, Mapping[str, float]] = {}
        for report in self.reports:
            by_step |= {each.step: each.shares for each in report.measured if each.shares}
        for record in self.records:
            layers = record.get("by_layer")
            if not isinstance(layers, Mapping):
                continue
            shares = {
                str(layer): _share(numbers.get("share"))
                for layer, numbers in layers.items()
                if isinstance(numbers, Mapping) and numbers.get("share") is not None
            }
            if shares:
                by_step[record["step"]] = shares
        return dict(sorted(by_step.items()))

    def numbers(self, name: str) -> list[tuple[int, float]]:
        """Return ``(step, number)`` of each record; NaN for a record without this number."""
        return [(record["step"], number(record.get(name))) for record in self.records]


def _record(margins: StabilityMargins) -> Record:
    record: dict[str, Any] = {"step": margins.step, **margins.record()}
    layers = margins.layers
    if layers is not None and "share" in layers.columns:
        pairs = zip(layers.names, layers.column("share"), strict=True)
        record["by_layer"] = {layer: {"share": share} for layer, share in pairs}
    return record


def number(value: Any) -> float:
    """Return ``value`` as a float; NaN if it is not a number.

    >>> number(2), number(None), number("3")
    (2.0, nan, nan)
    """
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def _step(value: Any) -> int:
    """Return a step as an integer; raise an error if it is infinite or too large for a chart."""
    step = int(value)
    float(step)  # an OverflowError for integers beyond the largest float
    return step


def _share(value: Any) -> float:
    share = number(value)
    return share if math.isfinite(share) else math.nan
