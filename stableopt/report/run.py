"""`Run`: a run as read from its JSON lines and the reports of its flight recorder."""

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

_FORM_ERRORS = (
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that a file of another form raises while it is read."""


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
            measured.append((_step(margins.step), loss, ratio, shares))
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
            by_step |= {step: shares for step, _, _, shares in report.measured if shares}
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


def read_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, or the run of one JSON-lines file with the reports in its folder.

    Lines that a crash cut short are ignored, and so are lines of other loggers. If a run was resumed or
    started again, its lines replace those of the same and later steps, and reports whose measurements
    were replaced are left out. Named pipes, broken links and reports of another form are skipped.

    Args:
        path: a folder with a file ``*.jsonl`` of a :class:`~stableopt.JSONLinesSink`, with reports
            ``step-*/report.json`` at any depth, or with both; or that file.

    Raises:
        FileNotFoundError: if there is neither a file nor a report.
        ValueError: for a folder with several runs, and for the folder of a single report.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        kind = "not a regular file" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {kind}")
    is_report_folder = folder.name.startswith("step-") and (folder / "report.json").is_file()
    if is_report_folder and path.suffix != ".jsonl":
        raise ValueError(f"{path} is of one report: pass the folder of the run, {folder.parent}")
    skipped: list[str] = []
    lines_by_file: dict[Path, _Lines] = {}
    for file in [path] if path.is_file() else _regular_files(folder, "*.jsonl", skipped):
        try:
            lines_by_file[file] = _Lines(file)
        except OSError as error:
            if file == path:
                raise
            skipped.append(f"{file}: {error.strerror}")
    report_files = _regular_files(folder, "step-*/report.json", skipped)
    if not lines_by_file and not report_files:
        raise FileNotFoundError(
            f"{path}: expected a file *.jsonl of a JSONLinesSink, or reports step-*/report.json of a"
            f" FlightRecorder{'; skipped ' if skipped else ''}{', '.join(skipped)}"
        )
    runs = {file: lines for file, lines in lines_by_file.items() if lines.records or lines.notes}
    if len(runs) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in runs)
        raise ValueError(
            f"{path}: expected the JSON lines of one run, and it has {names}; pass one"
        )
    reports, unreadable = [], sum(lines.unreadable for lines in lines_by_file.values())
    for file in report_files:
        try:
            reports.append(FlightReport.of(json.loads(file.read_text("utf-8", "replace"))))
        except (OSError, *_FORM_ERRORS) as error:
            unreadable += 1
            skipped.append(f"{file}: not a report ({type(error).__name__})")
    reports.sort(key=lambda report: report.step)
    name = path.resolve().name
    if not runs:
        return Run(name, reports=reports, unreadable=unreadable, skipped=skipped)
    (lines,) = runs.values()
    kept = lines.matching(reports)
    superseded = lines.superseded + len(reports) - len(kept)
    return Run(name, lines.records, lines.notes, kept, unreadable, superseded, skipped)


def _regular_files(folder: Path, pattern: str, skipped: list[str]) -> list[Path]:
    """Return the regular files of a pattern; list others, such as broken links, in ``skipped``."""
    paths = sorted(folder.rglob(pattern))
    skipped += [f"{path}: not a regular file" for path in paths if not path.is_file()]
    return [path for path in paths if path.is_file()]


class _Lines:
    """The measurements and notes of a JSON-lines file, without superseded ones."""

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
                if self._last_step > step:  # a resumed run, which may not have measured yet
                    self._drop(step + 1, step)
                self.notes.append((step, line["note"]))
            elif "failed" in line and "converged" in line:
                is_repeated = bool(self.records) and self.records[-1]["step"] >= step
                # In one run a note may precede the measurement of its step, so it is kept.
                is_resumed = is_repeated or self._last_step > step
                self._drop(step, step if is_resumed else step + 1)
                self.records.append(line)

    @property
    def _last_step(self) -> int:
        """The last step of the kept records and notes, -1 without any."""
        steps = [line["step"] for line in self.records[-1:]] + [step for step, _ in self.notes[-1:]]
        return max(steps, default=-1)

    def _drop(self, records_from: int, notes_from: int) -> None:
        """Remove the records and notes from these steps on, as superseded."""
        while self.records and self.records[-1]["step"] >= records_from:
            self.records.pop()
            self.superseded += 1
        while self.notes and self.notes[-1][0] >= notes_from:
            self.notes.pop()
            self.superseded += 1

    def matching(self, reports: Iterable[FlightReport]) -> list[FlightReport]:
        """Return the reports whose measurements are in the lines, without repeated alarms."""
        kept: list[FlightReport] = []
        losses = {line["step"]: number(line["loss"]) for line in self.records if "loss" in line}
        steps = {line["step"] for line in self.records}
        for report in reports:
            if not self._matches(report, losses, steps):
                continue
            # A resumed run that is bit for bit the earlier one writes its reports again.
            last = kept[-1] if self.superseded and kept else None
            if last is not None and (last.step, last.alarm) == (report.step, report.alarm):
                kept.pop()
            kept.append(report)
        return kept

    def _matches(self, report: FlightReport, losses: dict[int, float], steps: set[int]) -> bool:
        for step, loss, *_ in report.measured:
            line_loss = losses.get(step, loss)
            if line_loss != loss and (math.isfinite(line_loss) or math.isfinite(loss)):
                return False
            # Unless the run was resumed, lines are missing for other reasons, such as a full disk.
            if self.superseded and step not in steps and step > min(steps, default=step):
                return False
        return True

    def _objects(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of the lines, and count unreadable lines."""
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.strip() else None
                except (ValueError, RecursionError):
                    self.unreadable += 1
                    continue
                if isinstance(content, dict):
                    yield content
