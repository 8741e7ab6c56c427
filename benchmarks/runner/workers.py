"""`executor`: an executor by name: local processes, Dask workers or Slurm jobs."""

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

TIMEOUT_MINUTES = 24 * 60
"""Default time limit of a Slurm job; submitit's own default is 5."""


def executor(name: str, workers: int) -> Callable[[], Executor]:
    """Return a function that makes an executor.

    Args:
        name: ``"processes"``; ``"dask:ADDRESS"``, the address of a scheduler; ``"slurm:FOLDER"``,
            the folder of submitit's files; or ``"local:FOLDER"``, submitit's emulation of Slurm on
            this machine. The last two take submitit's parameters after the folder, as in
            ``"slurm:logs,timeout_min=600,slurm_partition=gpu,gpus_per_node=1"``.
        workers: number of processes.

    Raises:
        ValueError: for an unknown name, ``workers < 1``, or a package that is not installed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    kind, _, location = name.partition(":")
    if kind == "processes" and not location:
        # OpenMP threads that spin while waiting make a run ten times slower if another program uses
        # one of the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # Torch's thread pool does not survive a fork.
        context = multiprocessing.get_context("spawn")
        return lambda: _Processes(workers, mp_context=context, initializer=_die_with_parent)
    if kind == "dask" and location:
        _require("distributed")
        return lambda: _Dask(location)
    if kind in ("slurm", "local") and location:
        _require("submitit")
        folder, *texts = location.split(",")
        parameters = {"timeout_min": TIMEOUT_MINUTES, **dict(map(_parameter, texts))}
        return lambda: _submitit(kind, Path(folder), parameters)
    raise ValueError(
        f"executor={name!r}: expected processes, dask:ADDRESS, slurm:FOLDER or local:FOLDER"
    )


def _require(package: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ValueError(f"{package} is not installed: pip install 'stableopt[bench-cluster]'")


def _parameter(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"executor: {text!r}, expected KEY=VALUE, as in timeout_min=600")
    return key, int(value) if value.isdigit() else value


def _die_with_parent() -> None:
    """Exit when the parent process exits: pool processes would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Processes(ProcessPoolExecutor):
    """A pool whose processes can be stopped."""

    def stop(self) -> None:
        """Kill the processes; their jobs resume from checkpoints."""
        for process in multiprocessing.active_children():
            process.kill()
        self.shutdown()


class _Dask:
    """Dask's executor; ``shutdown`` also closes its client."""

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
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, RuntimeError) as error:  # for example without srun
        raise ValueError(f"executor={cluster}:{folder}: {error}") from None
    made: Executor = executor
    return made
