"""`run`: runs the parts of the plan one after the other, each in a process, and writes their results."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.plan import PARTS, Part
from benchmarks.gpu.setting import ROOT, SIMULATED
from benchmarks.perf.timing import machine
from benchmarks.runner.files import read_json, write_json

__all__ = ["Outcome", "check", "run", "summary"]

MIN_SECONDS = 10.0
"""Remaining time below which no part starts: importing torch alone takes seconds."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part.

    Attributes:
        part: its name.
        title: its description.
        outcome: ``"done"``, ``"failed"``, ``"stopped"`` at its time limit, ``"cannot run"`` on this
            machine, or ``"no time"`` left to start.
        seconds: its duration.
        said: its headline, or the reason for another outcome.
    """

    part: str
    title: str
    outcome: str
    seconds: float
    said: str


def check(device: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` for unknown parts, or for a device that does not exist."""
    unknown = {*names} - {*PARTS}
    if unknown:
        known = ", ".join(PARTS)
        raise ValueError(f"gpu: {', '.join(sorted(unknown))}: expected some of {known}")
    if device == SIMULATED:
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"gpu: --device {device}: expected cuda, cuda:N, or {SIMULATED}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"gpu: --device {device}: torch {torch.__version__} finds no GPU here;"
            f" --device {SIMULATED} runs the same parts in miniature without one"
        )


def run(
    device: str,
    out: Path,
    *,
    seconds: float,
    names: Sequence[str] = (),
    data_dir: Path | None = None,
    parts: Mapping[str, Part] = PARTS,
    command: Callable[[str], Sequence[str]] | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run parts in order until the time is up; write ``gpu.json`` and ``gpu.md`` after each.

    Args:
        device: see :class:`~benchmarks.gpu.setting.Setting`.
        out: folder of the results; a part's output is in ``NAME.log``.
        seconds: time limit for all parts together.
        names: names of the parts to run; all by default.
        data_dir: folder of the data.
        parts: the parts by name.
        command: returns the command line that runs a part; by default ``python -m benchmarks.gpu``.
        say: prints a line of progress.

    Returns:
        The outcome of each part.
    """
    out.mkdir(parents=True, exist_ok=True)
    arguments = [device, str(out.resolve()), *([str(data_dir.resolve())] if data_dir else [])]
    command = command or (lambda name: [sys.executable, "-m", "benchmarks.gpu", name, *arguments])
    about = {**machine(device), "device": SIMULATED} if device == SIMULATED else machine(device)
    end, outcomes = time.monotonic() + seconds, []
    for name in names or parts:
        part, seconds_left = parts[name], end - time.monotonic()
        if seconds_left < min(MIN_SECONDS, seconds):
            said = f"{max(seconds_left, 0):.0f} s of the time budget were left"
            outcomes.append(Outcome(name, part.title, "no time", 0.0, said))
        else:
            say(f"{name}: {part.title} (at most {min(part.seconds, seconds_left):.0f} s)")
            start = time.monotonic()
            outcome, said = _run(command(name), out, name, min(part.seconds, seconds_left))
            outcomes.append(Outcome(name, part.title, outcome, time.monotonic() - start, said))
        say(f"  {outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s: {said}")
        write_json(out / "gpu.json", {"machine": about, "parts": list(map(asdict, outcomes))})
        (out / "gpu.md").write_text(summary(about, outcomes))
    return outcomes


def _run(command: Sequence[str], out: Path, name: str, limit: float) -> tuple[str, str]:
    """Run a part's process; return its outcome, and its headline or the reason."""
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # including its child processes
            process.wait()
    if code is None:
        return "stopped", f"not finished after {limit:.0f} s; what it printed is in {log.name}"
    if result.exists():
        part_result = read_json(result)
        return part_result["outcome"], part_result["said"]
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return "failed", f"{lines[-1]} (exit code {code}; see {log.name})"


def summary(about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return a page of Markdown: the machine, a table of the parts, and those that are not done."""
    lines = [f"# {about['device']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in about.items() if key != "device"]
    lines += ["", "| part | outcome | seconds | what came out |", "| --- | --- | --- | --- |"]
    for outcome in outcomes:
        said = outcome.said.replace("|", "\\|")
        lines.append(
            f"| {outcome.part}: {outcome.title} | {outcome.outcome} | {outcome.seconds:.0f} | {said} |"
        )
    not_done = [outcome.part for outcome in outcomes if outcome.outcome != "done"]
    lines += ["", f"Not done: {', '.join(not_done) or 'nothing'}."]
    return "\n".join(lines) + "\n"
