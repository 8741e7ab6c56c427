"""What a running job has to work with, and the function that a worker calls."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.runner.job import Job, Place
from benchmarks.runner.store import Store, plain, to_disk, write_json

__all__ = ["Work", "work"]

PROGRESS_EVERY = 1.0
"""Seconds between two notes of how far a job is: for people, who need no more."""

ONE_AT_A_TIME = threading.Lock()
"""In a process, however many threads an executor has: torch's global generator, which initialisations
seed, and its number of threads are the process's."""


class Work:
    """What a running job has: its place, its needs' results, and a folder to report to.

    Attributes:
        place: where it runs.
        folder: its own, for anything else that is to be kept.
    """

    def __init__(self, job: Job, store: Store, place: Place) -> None:
        self.place = place
        self.folder = store.part(job)
        self._store = store
        self._noted = 0.0
        self._trace_path = self.folder / "trace.jsonl"
        self._checkpoint_path = self.folder / "checkpoint.pt"

    def result(self, need: Job) -> dict[str, Any]:
        """Return what a job that this one needs found."""
        return self._store.result(need)

    def tensors(self, need: Job) -> dict[str, Tensor]:
        """Return the tensors that a job that this one needs saved."""
        return self._store.tensors(need)

    def trace(self, **record: Any) -> None:
        """Append a line to ``trace.jsonl``, at once."""
        line = json.dumps(plain(record), allow_nan=False, ensure_ascii=False)
        with self._trace_path.open("a") as file:
            file.write(line + "\n")

    def progress(self, share: float, text: str = "") -> None:
        """Note that ``share`` of the work, from 0 to 1, is done. Cheap: call it at every step."""
        now = time.monotonic()
        if now - self._noted >= PROGRESS_EVERY:
            self._noted = now
            told = {"share": share, "text": text}
            write_json(self.folder / "progress.json", told, durable=False)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Keep tensors for the jobs that need this one."""
        torch.save(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            self.folder / "tensors.pt",
        )

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Keep a state to go on from, should the process be killed: tensors and plain values."""
        self._trace_path.touch()
        length = self._trace_path.stat().st_size
        partial = self._checkpoint_path.with_suffix(".partial")
        torch.save({"state": state, "trace": length}, partial)
        to_disk(self._trace_path)
        to_disk(partial)
        os.replace(partial, self._checkpoint_path)

    def restored(self) -> dict[str, Any] | None:
        """Return the state that was kept last, with the trace cut back to what it was then.

        ``None`` if there is none, with an empty trace.
        """
        self._trace_path.touch()
        if not self._checkpoint_path.exists():
            os.truncate(self._trace_path, 0)
            return None
        kept = torch.load(self._checkpoint_path, weights_only=True, map_location=self.place.device)
        os.truncate(self._trace_path, kept["trace"])
        state: dict[str, Any] = kept["state"]
        return state

    def begin_anew(self) -> None:
        """Remove the checkpoint: it may be what led to an error."""
        self._checkpoint_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what only the running job needed."""
        for name in ("checkpoint.pt", "progress.json", "failed.json"):
            (self.folder / name).unlink(missing_ok=True)
        for left in self.folder.glob("*.partial"):  # by a process killed while it wrote
            left.unlink()


def work(jobs: Sequence[Job], root: Path, place: Place) -> dict[str, float | None]:
    """Run jobs in this process, as one ensemble if there are several; what a worker calls.

    Returns:
        The seconds each took, in an ensemble its share, by id; ``None`` for one that was done
        already, or whose error was recorded in its folder.
    """
    store = Store(root)
    with ExitStack() as locks:
        # In one order everywhere, lest two processes wait for each other.
        for job in sorted(jobs, key=lambda job: job.id):
            locks.enter_context(store.lock(job))
        locks.enter_context(ONE_AT_A_TIME)
        # Another process, with the same folder, may have been quicker.
        left = [job for job in jobs if not store.done(job) and store.failure(job) is None]
        times: dict[str, float | None] = dict.fromkeys((job.id for job in jobs), None)
        if left:
            times.update(_run(left, store, place))
        return times


def _run(jobs: Sequence[Job], store: Store, place: Place) -> dict[str, float]:
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    works, abouts = [], []
    for job in jobs:
        _prepare(store.part(job), go_on=len(jobs) == 1)
        works.append(Work(job, store, place))
        abouts.append(_about(job, place, len(jobs)))
        write_json(works[-1].folder / "job.json", abouts[-1])
    began = time.perf_counter()
    try:
        if len(jobs) == 1:
            results = [jobs[0].run(works[0])]
        else:
            results = type(jobs[0]).run_together(list(jobs), works)
        seconds = (time.perf_counter() - began) / len(jobs)
        for its, about, result in zip(works, abouts, results, strict=True):
            write_json(its.folder / "result.json", result)
            write_json(its.folder / "job.json", {**about, "seconds": seconds})
    except (Exception, SystemExit) as error:
        for job, its in zip(jobs, works, strict=True):
            store.fail(job, f"{type(error).__name__}: {error}", traceback.format_exc())
            its.begin_anew()
        return {}
    for job, its in zip(jobs, works, strict=True):
        its.close()
        store.finish(job)
    return {job.id: seconds for job in jobs}


def _prepare(folder: Path, go_on: bool) -> None:
    """Empty the folder, but for what a killed process has left to go on from."""
    if folder.exists() and not (go_on and (folder / "checkpoint.pt").exists()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _about(job: Job, place: Place, members: int) -> dict[str, Any]:
    device = torch.device(place.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "kind": job.kind,
        "schema": job.schema,
        "config": job.config,
        "needs": [need.id for need in job.needs],
        "revision": revision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "ensemble": members,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def revision() -> str | None:
    """Return the git revision of this code, with a ``+`` if files differ from it."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "../..", ":!../results"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
