"""`run`: the parts of the plan one after the other, each in a process, and what came out of them."""

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

LEAST = 10.0
"""Seconds without which a part is not begun: importing torch takes a part of them."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        part: its name.
        title: what it does.
        outcome: ``"done"``, ``"failed"``, ``"stopped"`` at its limit, ``"cannot run"`` here, or
            ``"no time"`` left to begin.
        seconds: that it took.
        said: its headline, or the reason.
    """

    part: str
    title: str
    outcome: str
    seconds: float
    said: str


def check(device: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` for parts that do not exist, and for a device that is not there."""
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
        out: folder of the results; what a part prints is in ``NAME.log``.
        seconds: for all of them.
        names: of the parts; all by default.
        data_dir: where the data are.
        parts: by name.
        command: the command line that runs a part, by its name; by default this package's own.
        say: takes a line at a time.

    Returns:
        How each part ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    where = [device, str(out.resolve()), *([str(data_dir.resolve())] if data_dir else [])]
    command = command or (lambda name: [sys.executable, "-m", "benchmarks.gpu", name, *where])
    about = {**machine(device), "device": SIMULATED} if device == SIMULATED else machine(device)
    end, outcomes = time.monotonic() + seconds, []
    for name in names or parts:
        part, left = parts[name], end - time.monotonic()
        if left < min(LEAST, seconds):
            said = f"{max(left, 0):.0f} s of the time budget were left"
            outcomes.append(Outcome(name, part.title, "no time", 0.0, said))
        else:
            say(f"{name}: {part.title} (at most {min(part.seconds, left):.0f} s)")
            began = time.monotonic()
            how, said = _run(command(name), out, name, min(part.seconds, left))
            outcomes.append(Outcome(name, part.title, how, time.monotonic() - began, said))
        say(f"  {outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s: {said}")
        write_json(out / "gpu.json", {"machine": about, "parts": list(map(asdict, outcomes))})
        (out / "gpu.md").write_text(summary(about, outcomes))
    return outcomes


def _run(command: Sequence[str], out: Path, name: str, limit: float) -> tuple[str, str]:
    """Run one process; return how it ended, and its headline or the reason."""
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
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
    if code is None:
        return "stopped", f"not finished after {limit:.0f} s; what it printed is in {log.name}"
    if result.exists():
        found = read_json(result)
        return found["outcome"], found["said"]
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return "failed", f"{lines[-1]} (exit code {code}; see {log.name})"


def summary(about: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return a page of Markdown: the machine, a table of the parts, and what did not run."""
    lines = [f"# {about['device']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in about.items() if key != "device"]
    lines += ["", "| part | outcome | seconds | what came out |", "| --- | --- | --- | --- |"]
    for one in outcomes:
        said = one.said.replace("|", "\\|")
        lines.append(f"| {one.part}: {one.title} | {one.outcome} | {one.seconds:.0f} | {said} |")
    missing = [one.part for one in outcomes if one.outcome != "done"]
    lines += ["", f"Not done: {', '.join(missing) or 'nothing'}."]
    return "\n".join(lines) + "\n"
