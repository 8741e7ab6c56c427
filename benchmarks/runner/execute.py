"""`work`: runs jobs in the calling process and records their results or errors."""

from __future__ import annotations

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

from benchmarks.runner.context import Work
from benchmarks.runner.files import write_json
from benchmarks.runner.job import Job
from benchmarks.runner.place import Place
from benchmarks.runner.store import Store

__all__ = ["work"]

ONE_AT_A_TIME = threading.Lock()
"""Jobs in one process run one at a time: threads share torch's global generator and thread count."""


def work(jobs: Sequence[Job], root: Path, place: Place) -> dict[str, float | None]:
    """Run jobs in this process, several jobs as one ensemble. Workers call this function.

    Returns:
        The seconds of each job by id, in an ensemble its equal share; ``None`` for a job that was
        already done or that failed, whose error is recorded in its folder.
    """
    store = Store(root)
    with ExitStack() as locks:
        # All processes lock in the same order, so that no two can deadlock.
        for job in sorted(jobs, key=lambda job: job.id):
            locks.enter_context(store.lock(job))
        locks.enter_context(ONE_AT_A_TIME)
        # Another process that shares the folder may have finished some of them.
        remaining = [job for job in jobs if not store.done(job) and store.failure(job) is None]
        times: dict[str, float | None] = dict.fromkeys((job.id for job in jobs), None)
        if remaining:
            times.update(_run(remaining, store, place))
        return times


def _run(jobs: Sequence[Job], store: Store, place: Place) -> dict[str, float]:
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    workspaces, abouts = [], []
    for job in jobs:
        _prepare(store.part(job), resume=len(jobs) == 1)
        workspaces.append(Work(job, store, place))
        abouts.append(_about(job, place, len(jobs)))
        write_json(workspaces[-1].folder / "job.json", abouts[-1])
    try:
        if len(jobs) == 1:
            results = [jobs[0].run(workspaces[0])]
        else:
            results = type(jobs[0]).run_together(list(jobs), workspaces)
        seconds = workspaces[0].seconds / len(jobs)
        for workspace, about, result in zip(workspaces, abouts, results, strict=True):
            write_json(workspace.folder / "result.json", result)
            write_json(workspace.folder / "job.json", {**about, "seconds": seconds})
    except (Exception, SystemExit) as error:
        for job, workspace in zip(jobs, workspaces, strict=True):
            store.fail(job, f"{type(error).__name__}: {error}", traceback.format_exc())
            workspace.drop_checkpoint()
        return {}
    for job, workspace in zip(jobs, workspaces, strict=True):
        workspace.close()
        store.finish(job)
    return {job.id: seconds for job in jobs}


def _prepare(folder: Path, resume: bool) -> None:
    """Create or empty the folder; to ``resume``, keep one that holds a checkpoint."""
    if folder.exists() and not (resume and (folder / "checkpoint.pt").exists()):
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
    """Return the git revision of this code, with a ``+`` if the working tree differs from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "../..", ":!../results"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
