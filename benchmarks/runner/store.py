"""`Store`: the folders of jobs, what lies where, and when a job counts as done.

A job works in ``jobs/ID.part`` and is done when that is renamed to ``jobs/ID``. The rename is
atomic, so a folder without the suffix is always complete. In both:

    job.json       configuration, versions, git revision, device, when it began, how long it took
    trace.jsonl    what the job reported along the way, a line each
    result.json    what it found
    tensors.pt     weights, if other jobs need them
    failed.json    in a .part only: the error with which it ended

Only ``job.json`` depends on time and place: the other files are the same whenever a job is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.runner.files import read_json, read_lines, to_disk, write_json

__all__ = ["Store"]


class Named(Protocol):
    """What the store needs of a job."""

    @property
    def id(self) -> str:
        """The folder's name."""

    def typed(self, found: dict[str, Any]) -> Any:
        """Return the content of ``result.json`` as the type that the job declares."""


class Store:
    """The folders of jobs under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = root / "jobs"

    def folder(self, job: Named) -> Path:
        """Return the folder of the results of a job that is done."""
        return self.jobs / job.id

    def part(self, job: Named) -> Path:
        """Return the folder that the job works in until then."""
        return self.jobs / f"{job.id}.part"

    def lock(self, job: Named) -> FileLock:
        """Return the lock that a job's process holds. The system releases it if the process dies."""
        (self.jobs / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.jobs / ".locks" / f"{job.id}.lock")

    def running(self, job: Named) -> bool:
        """Say whether a process works on the job now."""
        if not self.part(job).exists():
            return False
        lock = self.lock(job)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            return True
        lock.release()
        return False

    def done(self, job: Named) -> bool:
        """Say whether there is a result."""
        return self.folder(job).is_dir()

    def failure(self, job: Named) -> dict[str, Any] | None:
        """Return the error with which the job ended, if it did."""
        path = self.part(job) / "failed.json"
        return read_json(path) if path.exists() else None

    def fail(self, job: Named, error: str, details: str = "") -> None:
        """Record that the job ended with an error."""
        self.part(job).mkdir(parents=True, exist_ok=True)
        write_json(self.part(job) / "failed.json", {"error": error, "details": details})

    def forgive(self, job: Named) -> None:
        """Allow a failed job to run again, from its checkpoint if it has one."""
        (self.part(job) / "failed.json").unlink(missing_ok=True)

    def begun(self, job: Named) -> bool:
        """Say whether the job has a checkpoint to continue from."""
        return (self.part(job) / "checkpoint.pt").exists()

    def finish(self, job: Named) -> None:
        """Count the job as done: its files reach the disk before the folder is renamed."""
        for path in (*self.part(job).iterdir(), self.part(job)):
            to_disk(path)
        os.replace(self.part(job), self.folder(job))
        to_disk(self.jobs)

    def result(self, job: Named) -> Any:
        """Return what a job found: its ``Result``, or a dictionary if it declares none.

        Raises:
            FileNotFoundError: if it is not done.
        """
        return job.typed(read_json(self.folder(job) / "result.json"))

    def trace(self, job: Named) -> list[dict[str, Any]]:
        """Return what a job that is done reported along the way."""
        return read_lines(self.folder(job) / "trace.jsonl")

    def about(self, job: Named) -> dict[str, Any]:
        """Return configuration, versions, device and time of a job that is done."""
        found: dict[str, Any] = read_json(self.folder(job) / "job.json")
        return found

    def tensors(self, job: Named) -> dict[str, Tensor]:
        """Return the tensors that a job saved."""
        tensors: dict[str, Tensor] = torch.load(
            self.folder(job) / "tensors.pt", weights_only=True, map_location="cpu"
        )
        return tensors
