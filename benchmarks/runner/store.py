"""The folders of jobs: what lies where, and when a job counts as done.

A job works in ``jobs/ID.part`` and is done when that has been renamed to ``jobs/ID``, which is
atomic: there is no moment at which a folder without the suffix is incomplete. In both:

    job.json       configuration, versions, git revision, device, when it began, how long it took
    trace.jsonl    what the job reported along the way, a line each, as it came
    result.json    what it found
    tensors.pt     weights, if others need them
    failed.json    in a .part only: the error with which it ended

Only ``job.json`` tells of time and place: the others are the same whenever a job is run.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.runner.job import Job

__all__ = ["Store", "plain", "read_json", "read_lines", "to_disk", "write_json"]


class Store:
    """The folders of jobs under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = root / "jobs"

    def folder(self, job: Job) -> Path:
        """Return where the results lie once the job is done."""
        return self.jobs / job.id

    def part(self, job: Job) -> Path:
        """Return where the job works until then."""
        return self.jobs / f"{job.id}.part"

    def lock(self, job: Job) -> FileLock:
        """Return the lock of whoever runs the job. The system opens it when the process dies."""
        (self.jobs / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.jobs / ".locks" / f"{job.id}.lock")

    def done(self, job: Job) -> bool:
        """Say whether there is a result."""
        return self.folder(job).is_dir()

    def failure(self, job: Job) -> dict[str, Any] | None:
        """Return the error with which the job ended, if it did."""
        path = self.part(job) / "failed.json"
        return read_json(path) if path.exists() else None

    def fail(self, job: Job, error: str, details: str = "") -> None:
        """Record that the job ended with an error."""
        self.part(job).mkdir(parents=True, exist_ok=True)
        write_json(self.part(job) / "failed.json", {"error": error, "details": details})

    def forgive(self, job: Job) -> None:
        """Let a job that has failed be run again: from its checkpoint, if its worker died."""
        (self.part(job) / "failed.json").unlink(missing_ok=True)

    def begun(self, job: Job) -> bool:
        """Say whether there is a checkpoint to go on from."""
        return (self.part(job) / "checkpoint.pt").exists()

    def finish(self, job: Job) -> None:
        """Count the job as done: its files are on the disk before the folder has its name."""
        for path in (*self.part(job).iterdir(), self.part(job)):
            to_disk(path)
        os.replace(self.part(job), self.folder(job))
        to_disk(self.jobs)

    def result(self, job: Job) -> dict[str, Any]:
        """Return what a job found.

        Raises:
            FileNotFoundError: if it is not done.
        """
        found: dict[str, Any] = read_json(self.folder(job) / "result.json")
        return found

    def trace(self, job: Job) -> list[dict[str, Any]]:
        """Return what a job that is done reported along the way."""
        return read_lines(self.folder(job) / "trace.jsonl")

    def about(self, job: Job) -> dict[str, Any]:
        """Return configuration, versions, device and time of a job that is done."""
        found: dict[str, Any] = read_json(self.folder(job) / "job.json")
        return found

    def tensors(self, job: Job) -> dict[str, Tensor]:
        """Return the tensors that a job saved."""
        tensors: dict[str, Tensor] = torch.load(
            self.folder(job) / "tensors.pt", weights_only=True, map_location="cpu"
        )
        return tensors


def plain(value: Any) -> Any:
    """Return ``value`` as JSON knows it: numbers that are not finite become ``None``.

    >>> plain({"a": (1, float("inf"))})
    {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write a file that is there whole or not at all; after a power cut too, if it is durable."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(
        json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    )
    if durable:
        to_disk(partial)
    os.replace(partial, path)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is where a power cut leaves it."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, the last one only if it is whole."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]
