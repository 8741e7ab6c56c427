"""`Lines`: the content of a JSON-lines file, and which flight reports belong to it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stableopt.report.run import FlightReport, Record, number

__all__ = ["Lines"]


class Lines:
    """The measurements and notes of a JSON-lines file, without superseded ones.

    Attributes:
        records: the measurements.
        notes: the decisions of steering, as step and reason.
        unreadable: the number of lines that could not be read.
        superseded: the number of measurements and notes that later lines replaced.

    Raises:
        OSError: if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.records: list[Record] = []
        self.notes: list[tuple[int, str]] = []
        self.unreadable = self.superseded = 0
        self._losses: dict[int, list[float]] = {}  # of all lines by step, superseded ones included
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
                if "loss" in line:
                    self._losses.setdefault(step, []).append(number(line["loss"]))

    @property
    def of_a_run(self) -> bool:
        """Whether the file has a measurement or a note: other loggers write JSON lines too."""
        return bool(self.records or self.notes)

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

    def has_measured(self, report: FlightReport) -> bool:
        """Return whether a measurement of ``report`` is in the lines, superseded ones included.

        A loss identifies it: the losses of two runs differ in some digit.
        """
        return not self.contradicts(report) and any(
            math.isfinite(each.loss) and each.loss in self._losses.get(each.step, ())
            for each in report.measured
        )

    def contradicts(self, report: FlightReport) -> bool:
        """Return whether ``report`` has another loss at a step than all lines of this step."""
        return any(
            each.step in self._losses
            and not any(_equal(each.loss, line) for line in self._losses[each.step])
            for each in report.measured
        )

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
        for step, loss, _, _ in report.measured:
            if not _equal(losses.get(step, loss), loss):
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


def _equal(loss: float, other: float) -> bool:
    """Return whether two losses are equal; losses that are not finite count as equal."""
    return loss == other or not (math.isfinite(loss) or math.isfinite(other))
