"""Executors by name: processes of this machine, Dask's workers, Slurm's jobs."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.runner.schedule import Executor

__all__ = ["executor"]


def executor(name: str, workers: int) -> Callable[[], Executor]:
    """Return what makes an executor.

    Args:
        name: ``"processes"``; ``"dask:ADDRESS"``, of a scheduler; ``"slurm:FOLDER"``, where
            submitit keeps its files, or ``"local:FOLDER"``, which is submitit's imitation of it on
            this machine.
        workers: processes.

    Raises:
        ValueError: for another name.
    """
    kind, _, where = name.partition(":")
    if kind == "processes" and not where:
        # Forked processes would share torch's threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        return lambda: ProcessPoolExecutor(
            workers, mp_context=context, initializer=_die_with_parent
        )
    if kind == "dask" and where:
        return lambda: _dask(where)
    if kind in ("slurm", "local") and where:
        return lambda: _submitit(kind, Path(where))
    raise ValueError(
        f"executor={name!r}: expected processes, dask:ADDRESS, slurm:FOLDER or local:FOLDER"
    )


def _die_with_parent() -> None:
    """End this process when its parent does: a pool's processes outlive one that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _dask(address: str) -> Executor:
    from distributed import Client

    made: Executor = Client(address).get_executor(pure=False)
    return made


def _submitit(cluster: str, folder: Path) -> Executor:
    import submitit

    made: Executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    return made
