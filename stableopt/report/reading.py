"""`read_run`: reads the run in a folder, and refuses a folder with several runs.

A flight report belongs to the nearest folder above it that has JSON lines of a run. If there is none,
the reports of a recorder are a separate run. They belong to the run of a JSON-lines file elsewhere in
the folder if it is the only one and contains their measurements.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TypeAlias

from stableopt.report.lines import Lines
from stableopt.report.run import FlightReport, Run

__all__ = ["read_run"]

_FORM_ERRORS = (
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that a file of another form raises while it is read."""

_Reports: TypeAlias = list[tuple[Path, FlightReport]]
"""Reports, each with its file."""


def read_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a folder, or the run of one JSON-lines file with the reports in its folder.

    Lines that a crash cut short are ignored, and so are lines of other loggers. If a run was resumed or
    started again, its lines replace those of the same and later steps, and reports whose measurements
    were replaced are left out. Named pipes, broken links, reports of another form, and reports whose
    measurements contradict the lines are skipped.

    Args:
        path: a folder with a file ``*.jsonl`` of a :class:`~stableopt.JSONLinesSink`, with reports
            ``step-*/report.json`` at any depth, or with both; or that file.

    Raises:
        FileNotFoundError: if there is neither a file nor a report.
        ValueError: for a folder with several runs, for the folder of a single report, and for a file
            without lines of a :class:`~stableopt.JSONLinesSink`.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if not folder.is_dir():
        kind = "not a regular file" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {kind}")
    is_report_folder = folder.name.startswith("step-") and (folder / "report.json").is_file()
    if is_report_folder and path.suffix != ".jsonl":
        raise ValueError(
            f"{path} holds a single report: pass the folder of the run, {folder.parent}"
        )
    return _run_of_file(path) if path.is_file() else _run_in_folder(path)


def _run_of_file(path: Path) -> Run:
    """Return the run of a JSON-lines file, with its own reports among those below its folder."""
    lines, folder = Lines(path), path.parent
    if not lines.of_a_run:
        raise ValueError(
            f"{path}: expected lines of a JSONLinesSink, and it has none; pass the folder of the run, or"
            " its file *.jsonl"
        )
    skipped: list[str] = []
    neighbours = _lines_by_file(folder, [])
    run_files = {path, *(file for file, its in neighbours.items() if its.of_a_run)}
    files = [
        file
        for file in _regular_files(folder, "step-*/report.json", skipped)
        if _run_folder(file, run_files) == folder
    ]
    reports, broken = _read_reports(files, skipped)
    if sum(file.parent == folder for file in run_files) > 1:
        # Only measurements tell which of several runs in one folder a report belongs to.
        reports = [(file, report) for file, report in reports if lines.has_measured(report)]
    return _run(path, lines, reports, lines.unreadable + broken, skipped)


def _run_in_folder(folder: Path) -> Run:
    """Return the only run in ``folder``."""
    skipped: list[str] = []
    lines_by_file = _lines_by_file(folder, skipped)
    files = _regular_files(folder, "step-*/report.json", skipped)
    if not lines_by_file and not files:
        raise FileNotFoundError(
            f"{folder}: expected a file *.jsonl of a JSONLinesSink, or reports step-*/report.json of a"
            f" FlightRecorder{'; skipped ' if skipped else ''}{', '.join(skipped)}"
        )
    runs = {file: lines for file, lines in lines_by_file.items() if lines.of_a_run}
    reports, broken = _read_reports(files, skipped)
    lines = next(iter(runs.values()), None)
    recorders: dict[Path, bool] = {}  # folders without lines, and whether the lines are theirs
    for file, report in reports:
        place = _run_folder(file, runs)
        if not any(run_file.parent == place for run_file in runs):
            measured = lines is not None and lines.has_measured(report)
            recorders[place] = recorders.get(place, False) or measured
    # With one file of lines elsewhere, as in logs/ next to reports/, the measurements tell.
    others = [place for place, measured in recorders.items() if len(runs) != 1 or not measured]
    if len(runs) + len(others) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in [*runs, *others])
        raise ValueError(
            f"{folder}: expected one run, but found several: {names}; pass one of them"
        )
    unreadable = sum(lines.unreadable for lines in lines_by_file.values()) + broken
    return _run(folder, lines, reports, unreadable, skipped)


def _run(
    path: Path, lines: Lines | None, reports: _Reports, unreadable: int, skipped: list[str]
) -> Run:
    """Return the run at ``path`` with ``lines`` and those of ``reports`` that do not contradict them."""
    own = []
    for file, report in sorted(reports, key=lambda pair: pair[1].step):
        if lines is not None and lines.contradicts(report):
            skipped.append(f"{file}: its measurements are those of another run")
        else:
            own.append(report)
    name = path.resolve().name
    if lines is None:
        return Run(name, reports=own, unreadable=unreadable, skipped=skipped)
    kept = lines.matching(own)
    superseded = lines.superseded + len(own) - len(kept)
    return Run(name, lines.records, lines.notes, kept, unreadable, superseded, skipped)


def _run_folder(report_file: Path, run_files: Collection[Path]) -> Path:
    """Return the nearest folder above a report that has JSON lines of a run, else its recorder's."""
    recorder = report_file.parent.parent
    with_lines = {file.parent for file in run_files}
    return next((place for place in (recorder, *recorder.parents) if place in with_lines), recorder)


def _lines_by_file(folder: Path, skipped: list[str]) -> dict[Path, Lines]:
    """Return the content of each JSON-lines file below ``folder`` that can be read."""
    lines_by_file = {}
    for file in _regular_files(folder, "*.jsonl", skipped):
        try:
            lines_by_file[file] = Lines(file)
        except OSError as error:
            skipped.append(f"{file}: {error.strerror}")
    return lines_by_file


def _read_reports(files: Iterable[Path], skipped: list[str]) -> tuple[_Reports, int]:
    """Return the reports in ``files``, and the number of files of another form."""
    reports: _Reports = []
    broken = 0
    for file in files:
        try:
            content = json.loads(file.read_text("utf-8", "replace"))
            reports.append((file, FlightReport.of(content)))
        except (OSError, *_FORM_ERRORS) as error:
            broken += 1
            skipped.append(f"{file}: not a report ({type(error).__name__})")
    return reports, broken


def _regular_files(folder: Path, pattern: str, skipped: list[str]) -> list[Path]:
    """Return the regular files of a pattern; list others, such as broken links, in ``skipped``."""
    paths = sorted(folder.rglob(pattern))
    skipped += [f"{path}: not a regular file" for path in paths if not path.is_file()]
    return [path for path in paths if path.is_file()]
