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

_OF_ANOTHER_FORM = (
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


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
            AttributeError, KeyError, OverflowError, TypeError, ValueError: if it is of another form.
        """
        alarm, verdict, evidence = (content[key] for key in ("alarm", "verdict", "evidence"))
        measured = []
        for its in evidence["measured"]:
            margins = StabilityMargins.from_dict(its["margins"])
            shares = {str(name): _share(share) for name, share in its["shares"].items()}
            step, loss, ratio = (
                _step(margins.step),
                number(margins.loss),
                number(margins.edge_ratio),
            )
            measured.append((step, loss, ratio, shares))
        return cls(
            _step(alarm["step"]),
            str(alarm["text"]),
            str(verdict["cause"]),
            str(verdict["layer"] or ""),
            str(verdict["text"]),
            [{**its, "step": _step(its["step"])} for its in evidence["steps"]],
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
        superseded: measurements, decisions and reports that a later run in the same folder replaced: it
            was resumed before them, or began again.
        skipped: files that were not read, and why.
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
                str(layer): _share(its.get("share"))
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


def _step(value: Any) -> int:
    """Return a step that a chart can show; raise an error for infinity and the like."""
    step = int(value)
    float(step)
    return step


def _alarm(report: FlightReport) -> tuple[int, str]:
    return report.step, report.alarm


def _share(value: Any) -> float:
    share = number(value)
    return share if math.isfinite(share) else math.nan


def read_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, or of one file of JSON lines with the reports in its folder.

    Lines that a crash cut short are read over, and so are lines of other loggers. Where a run was
    resumed or began again, its lines replace those of the same and later steps, and only reports whose
    measurements are among the lines that remain count. Named pipes and broken links are skipped, and so
    are reports of another form.

    Args:
        path: a folder with a file ``*.jsonl`` that :class:`~stableopt.JSONLinesSink` wrote, with
            reports ``step-*/report.json`` in it or in its folders, or with both; or that file.

    Raises:
        FileNotFoundError: if there is nothing of either kind.
        ValueError: for a folder with several such files, and for a file of one report.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        kind = "not a regular file" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {kind}")
    of_a_report = folder.name.startswith("step-") and (folder / "report.json").is_file()
    if of_a_report and path.suffix != ".jsonl":
        raise ValueError(f"{path} is of one report: pass the folder of the run, {folder.parent}")
    skipped: list[str] = []
    files = [path] if path.is_file() else _regular(folder, "*.jsonl", skipped)
    every: dict[Path, _Lines] = {}
    for file in files:
        try:
            every[file] = _Lines(file)
        except OSError as error:
            if file == path:
                raise
            skipped.append(f"{file}: {error.strerror}")
    found = {file: its for file, its in every.items() if its.records or its.notes}
    if len(found) > 1:
        listed = ", ".join(str(file.relative_to(folder)) for file in found)
        raise ValueError(
            f"{path}: expected the JSON lines of one run, and it has {listed}; pass one"
        )
    lines = next(iter(found.values()), None)
    places = _regular(folder, "step-*/report.json", skipped)
    if not every and not places:
        raise FileNotFoundError(
            f"{path}: expected a file *.jsonl of a JSONLinesSink, or reports step-*/report.json of a"
            f" FlightRecorder{'; skipped ' if skipped else ''}{', '.join(skipped)}"
        )
    reports, unreadable = [], sum(its.unreadable for its in every.values())
    for place in places:
        try:
            reports.append(FlightReport.of(json.loads(place.read_text("utf-8", "replace"))))
        except (OSError, *_OF_ANOTHER_FORM) as error:
            unreadable += 1
            skipped.append(f"{place}: not a report ({type(error).__name__})")
    reports.sort(key=lambda report: report.step)
    name = path.resolve().name
    if lines is None:
        return Run(name, reports=reports, unreadable=unreadable, skipped=skipped)
    kept = lines.reports(reports)
    superseded = lines.superseded + len(reports) - len(kept)
    return Run(name, lines.records, lines.notes, kept, unreadable, superseded, skipped)


def _regular(folder: Path, pattern: str, skipped: list[str]) -> list[Path]:
    """Return the files of a pattern; a named pipe would never end, and a broken link does not begin."""
    found = sorted(folder.rglob(pattern))
    skipped += [f"{file}: not a regular file" for file in found if not file.is_file()]
    return [file for file in found if file.is_file()]


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
            if number(step) == math.inf:
                self.unreadable += 1
                continue
            if isinstance(line.get("note"), str):
                if self._last > step:  # the run went back, and may not have measured since
                    self._drop(step + 1, step)
                self.notes.append((step, line["note"]))
            elif "failed" in line and "converged" in line:
                again = bool(self.records) and self.records[-1]["step"] >= step
                # A decision may come before the measurement of its step, as of an alarm.
                self._drop(step, step if again or self._last > step else step + 1)
                self.records.append(line)

    @property
    def _last(self) -> int:
        """The last step of a line that remains."""
        steps = [line["step"] for line in self.records[-1:]] + [step for step, _ in self.notes[-1:]]
        return max(steps, default=-1)

    def _drop(self, records_from: int, notes_from: int) -> None:
        while self.records and self.records[-1]["step"] >= records_from:
            self.records.pop()
            self.superseded += 1
        while self.notes and self.notes[-1][0] >= notes_from:
            self.notes.pop()
            self.superseded += 1

    def reports(self, reports: Iterable[FlightReport]) -> list[FlightReport]:
        """Return the reports whose measurements are those of the lines, each alarm once."""
        kept: list[FlightReport] = []
        losses = {line["step"]: number(line["loss"]) for line in self.records if "loss" in line}
        steps = {line["step"] for line in self.records}
        for report in reports:
            if not self._agrees(report, losses, steps):
                continue
            # A resumed run that repeats the one before to the bit writes its reports again.
            if self.superseded and kept and _alarm(kept[-1]) == _alarm(report):
                kept.pop()
            kept.append(report)
        return kept

    def _agrees(self, report: FlightReport, losses: dict[int, float], steps: set[int]) -> bool:
        for step, loss, *_ in report.measured:
            known = losses.get(step, loss)
            if known != loss and (math.isfinite(known) or math.isfinite(loss)):
                return False
            # Without a way back, lines may be missing for other reasons, such as a full disk.
            if self.superseded and step not in steps and step > min(steps, default=step):
                return False
        return True

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
