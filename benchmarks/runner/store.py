"""`Store`: the folders of jobs and their files.

A job works in ``jobs/ID.part``. When it is done, the folder is renamed to ``jobs/ID``, atomically, so
that a folder without the suffix is always complete. Its files are

    job.json       configuration, versions, git revision, device, start and duration
    trace.jsonl    records written during the run, one per line
    result.json    the result
    tensors.pt     weights, if other jobs need them
    failed.json    only in a .part folder: the error of a failed job

Only ``job.json`` depends on when and where the job runs.
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
    """The part of a job that the store uses."""

    @property
    def id(self) -> str:
        """The name of the job's folder."""

    def typed(self, content: dict[str, Any]) -> Any:
        """Convert the content of ``result.json`` to the type that the job declares."""


class Store:
    """The folders of jobs under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs = root / "jobs"

    def folder(self, job: Named) -> Path:
        """Return the folder of a finished job."""
        return self.jobs / job.id

    def part(self, job: Named) -> Path:
        """Return the folder that an unfinished job works in."""
        return self.jobs / f"{job.id}.part"

    def lock(self, job: Named) -> FileLock:
        """Return the lock that the job's process holds. The system releases it if the process dies."""
        (self.jobs / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.jobs / ".locks" / f"{job.id}.lock")

    def running(self, job: Named) -> bool:
        """Return whether a process is running the job."""
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
        """Return whether the job is done."""
        return self.folder(job).is_dir()

    def failure(self, job: Named) -> dict[str, Any] | None:
        """Return the error of a failed job, or ``None``."""
        path = self.part(job) / "failed.json"
        return read_json(path) if path.exists() else None

    def fail(self, job: Named, error: str, details: str = "") -> None:
        """Record the error of a failed job."""
        self.part(job).mkdir(parents=True, exist_ok=True)
        write_json(self.part(job) / "failed.json", {"error": error, "details": details})

    def clear_failure(self, job: Named) -> None:
        """Remove a job's error, so that it runs again, from its checkpoint if it has one."""
        (self.part(job) / "failed.json").unlink(missing_ok=True)

    def has_checkpoint(self, job: Named) -> bool:
        """Return whether the job can resume from a checkpoint."""
        return (self.part(job) / "checkpoint.pt").exists()

    def finish(self, job: Named) -> None:
        """Mark the job as done: flush its files to disk, then rename its folder."""
        for path in (*self.part(job).iterdir(), self.part(job)):
            to_disk(path)
        os.replace(self.part(job), self.folder(job))
        to_disk(self.jobs)

    def result(self, job: Named) -> Any:
        """Return a job's result: its ``Result``, or a dictionary if it declares none.

        Raises:
            FileNotFoundError: if the job is not done.
        """
        return job.typed(read_json(self.folder(job) / "result.json"))

    def trace(self, job: Named) -> list[dict[str, Any]]:
        """Return the trace of a finished job."""
        return read_lines(self.folder(job) / "trace.jsonl")

    def about(self, job: Named) -> dict[str, Any]:
        """Return configuration, versions, device and duration of a finished job."""
        about: dict[str, Any] = read_json(self.folder(job) / "job.json")
        return about

    def tensors(self, job: Named) -> dict[str, Tensor]:
        """Return the tensors that a job saved."""
        tensors: dict[str, Tensor] = torch.load(
            self.folder(job) / "tensors.pt", weights_only=True, map_location="cpu"
        )
        return tensors
