"""`Run`: what is known of a run from its JSON lines and the reports of its flight recorder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stableopt.stability.measure.margins import StabilityMargins

__all__ = ["FlightReport", "Record", "Run", "number", "read_run"]

Record = Mapping[str, Any]
"""A measurement: its ``step``, and numbers by name, as :class:`~stableopt.JSONLinesSink` writes them."""


@dataclass(frozen=True)
class FlightReport:
    """A report of the flight recorder.

    Attributes:
        step: of the alarm.
        alarm: what was seen.
        cause: the likely one.
        layer: that the evidence names, or ``""``.
        verdict: sentences.
        steps: the steps before, oldest first.
        measured: ``(step, loss, ratio, shares)`` of the measurements before.
    """

    step: int
    alarm: str
    cause: str
    layer: str
    verdict: str
    steps: Sequence[Record]
    measured: Sequence[tuple[int, float, float, Mapping[str, float]]]

    @classmethod
    def of(cls, content: Any) -> FlightReport:
        """Return the report that a ``report.json`` holds.

        Raises:
            KeyError, TypeError, ValueError: if it is of another form.
        """
        alarm, verdict, evidence = (content[key] for key in ("alarm", "verdict", "evidence"))
        measured = []
        for its in evidence["measured"]:
            margins = StabilityMargins.from_dict(its["margins"])
            shares = {str(name): number(share) for name, share in its["shares"].items()}
            measured.append(
                (margins.step, number(margins.loss), number(margins.edge_ratio), shares)
            )
        return cls(
            int(alarm["step"]),
            str(alarm["text"]),
            str(verdict["cause"]),
            str(verdict["layer"] or ""),
            str(verdict["text"]),
            [{**its, "step": int(its["step"])} for its in evidence["steps"]],
            measured,
        )


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: what the page calls it.
        records: its measurements, in the order of their steps.
        decisions: of steering: step and reason.
        reports: of the flight recorder, oldest first.
        unreadable: lines, and reports, that could not be read, as a crash leaves them.
        superseded: measurements that a run which was resumed has made again.
    """

    name: str
    records: Sequence[Record] = ()
    decisions: Sequence[tuple[int, str]] = ()
    reports: Sequence[FlightReport] = ()
    unreadable: int = 0
    superseded: int = 0

    @classmethod
    def of_history(cls, name: str, history: Iterable[StabilityMargins]) -> Run:
        """Return the run of a monitor's ``history``.

        >>> Run.of_history("demo", [StabilityMargins(step=3, sharpness=1.0)]).records[0]["sharpness"]
        1.0
        """
        return cls(name, [_recorded(its) for its in history])

    @property
    def failed(self) -> int:
        """How many measurements failed."""
        return sum(number(record.get("failed")) == 1 for record in self.records)

    @property
    def shares(self) -> dict[int, Mapping[str, float]]:
        """The share of each layer in the top eigenvector by step, where records or reports have it."""
        found: dict[int, Mapping[str, float]] = {}
        for report in self.reports:
            found |= {step: shares for step, _, _, shares in report.measured if shares}
        for record in self.records:
            layers = record.get("by_layer")
            numbers = layers.items() if isinstance(layers, Mapping) else ()
            shares = {
                str(layer): number(its.get("share"))
                for layer, its in numbers
                if isinstance(its, Mapping) and its.get("share") is not None
            }
            if shares:
                found[record["step"]] = shares
        return dict(sorted(found.items()))

    def numbers(self, name: str) -> list[tuple[int, float]]:
        """Return ``(step, number)`` of each record; not a number where there is none."""
        return [(record["step"], number(record.get(name))) for record in self.records]


def _recorded(margins: StabilityMargins) -> Record:
    record: dict[str, Any] = {"step": margins.step, **margins.record()}
    layers = margins.layers
    if layers is not None and "share" in layers.columns:
        pairs = zip(layers.names, layers.column("share"), strict=True)
        record["by_layer"] = {layer: {"share": share} for layer, share in pairs}
    return record


def number(value: Any) -> float:
    """Return ``value`` as a float; not a number if it is none.

    >>> number(2), number(None), number("3")
    (2.0, nan, nan)
    """
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def read_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, or of one file of JSON lines with the reports in its folder.

    Lines that a crash cut short are read over, and so are lines of other loggers. Where a run that
    was resumed wrote a step again, the later line counts.

    Args:
        path: a folder with a file ``*.jsonl`` that :class:`~stableopt.JSONLinesSink` wrote, with
            reports ``step-*/report.json`` in it or in its folders, or with both; or that file.

    Raises:
        FileNotFoundError: if there is nothing of either kind.
        ValueError: for a folder with several such files.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    files = [path] if path.is_file() else sorted(folder.rglob("*.jsonl"))
    every = {file: _Lines(file) for file in files}
    found = {file: its for file, its in every.items() if its.records or its.notes}
    if len(found) > 1:
        listed = ", ".join(str(file.relative_to(folder)) for file in found)
        raise ValueError(
            f"{path}: expected the JSON lines of one run, and it has {listed}; pass one"
        )
    lines = next(iter(found.values()), None)
    places = sorted(folder.rglob("step-*/report.json"))
    if not files and not places:
        raise FileNotFoundError(
            f"{path}: expected a file *.jsonl of a JSONLinesSink, or reports step-*/report.json of a"
            " FlightRecorder"
        )
    reports, broken = [], 0
    for place in places:
        try:
            reports.append(FlightReport.of(json.loads(place.read_text("utf-8", "replace"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            broken += 1
    reports.sort(key=lambda report: report.step)
    name = path.resolve().name
    unreadable = broken + sum(its.unreadable for its in every.values())
    if lines is None:
        return Run(name, reports=reports, unreadable=unreadable)
    return Run(name, lines.records, lines.notes, reports, unreadable, lines.superseded)


class _Lines:
    """What a file of JSON lines holds."""

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        self.notes: list[tuple[int, str]] = []
        self.unreadable = self.superseded = 0
        for line in self._objects(path):
            step = line.get("step")
            if not isinstance(step, int):
                continue
            if isinstance(line.get("note"), str):
                self.notes.append((step, line["note"]))
            elif "failed" in line and "converged" in line:
                while self.records and self.records[-1]["step"] >= step:
                    self.records.pop()
                    self.superseded += 1
                self.records.append(line)

    def _objects(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):
                    self.unreadable += 1
                    continue
                if isinstance(content, dict):
                    yield content
