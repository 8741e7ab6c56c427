"""`work`: runs jobs in this process and records what came of them; the call that workers make."""

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
"""One job runs at a time in a process: threads share torch's global generator and thread count."""


def work(jobs: Sequence[Job], root: Path, place: Place) -> dict[str, float | None]:
    """Run jobs in this process, as one ensemble if there are several; what a worker calls.

    Returns:
        The seconds each took, in an ensemble its share, by id; ``None`` for one that was done
        already, or whose error was recorded in its folder.
    """
    store = Store(root)
    with ExitStack() as locks:
        # In one order everywhere, so that two processes cannot deadlock.
        for job in sorted(jobs, key=lambda job: job.id):
            locks.enter_context(store.lock(job))
        locks.enter_context(ONE_AT_A_TIME)
        # Another process that shares the folder may have been quicker.
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
            its.drop_checkpoint()
        return {}
    for job, its in zip(jobs, works, strict=True):
        its.close()
        store.finish(job)
    return {job.id: seconds for job in jobs}


def _prepare(folder: Path, go_on: bool) -> None:
    """Empty the folder, unless it holds the checkpoint of a killed process."""
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
