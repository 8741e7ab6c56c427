"""`executor`: processes of this machine, Dask's workers or Slurm's jobs, by name."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.runner.schedule import Executor

__all__ = ["executor"]

MINUTES = 24 * 60
"""Time limit of a Slurm job by default; submitit's own default is 5."""


def executor(name: str, workers: int) -> Callable[[], Executor]:
    """Return a function that makes an executor.

    Args:
        name: ``"processes"``; ``"dask:ADDRESS"``, of a scheduler; ``"slurm:FOLDER"``, where
            submitit keeps its files, or ``"local:FOLDER"``, which is submitit's imitation of it on
            this machine. The last two take submitit's parameters after the folder, as in
            ``"slurm:logs,timeout_min=600,slurm_partition=gpu,gpus_per_node=1"``.
        workers: processes.

    Raises:
        ValueError: for another name, less than one worker, or a package that is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    kind, _, where = name.partition(":")
    if kind == "processes" and not where:
        # Threads that spin while they wait for each other make a run take ten times as long where
        # another program has one of the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # Forked processes would share torch's threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        return lambda: _Processes(workers, mp_context=context, initializer=_die_with_parent)
    if kind == "dask" and where:
        _installed("distributed")
        return lambda: _Dask(where)
    if kind in ("slurm", "local") and where:
        _installed("submitit")
        folder, *texts = where.split(",")
        parameters = {"timeout_min": MINUTES, **dict(map(_parameter, texts))}
        return lambda: _submitit(kind, Path(folder), parameters)
    raise ValueError(
        f"executor={name!r}: expected processes, dask:ADDRESS, slurm:FOLDER or local:FOLDER"
    )


def _installed(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"{package} is not installed: pip install 'stableopt[bench-cluster]'")


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"executor: {text!r}, expected KEY=VALUE, as in timeout_min=600")
    return key, int(value) if value.isdigit() else value


def _die_with_parent() -> None:
    """End this process when its parent does: a pool's processes outlive one that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Processes(ProcessPoolExecutor):
    """A pool whose processes can be stopped."""

    def stop(self) -> None:
        """Stop the processes in the middle of their jobs, which have checkpoints."""
        for process in multiprocessing.active_children():
            process.kill()
        self.shutdown()


class _Dask:
    """Dask's own executor, whose client is closed with it."""

    def __init__(self, address: str) -> None:
        from distributed import Client

        try:
            self.client = Client(address)
        except OSError as error:
            raise ValueError(f"executor=dask:{address}: no scheduler answers ({error})") from None
        self.executor = self.client.get_executor(pure=False)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        return self.executor.submit(function, *arguments)

    def shutdown(self) -> None:
        self.executor.shutdown()
        self.client.close()


def _submitit(cluster: str, folder: Path, parameters: dict[str, Any]) -> Executor:
    import submitit

    try:
        made = submitit.AutoExecutor(folder=folder, cluster=cluster)
        made.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError) as error:  # no srun here, say
        raise ValueError(f"executor={cluster}:{folder}: {error}") from None
    found: Executor = made
    return found
