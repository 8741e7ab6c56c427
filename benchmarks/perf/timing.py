"""Interleaved timing of alternatives, and the tables and files of the results."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.framework.tables import cell

__all__ = ["Config", "Timing", "interleaved", "once", "random_data", "report", "show", "write"]


@dataclass(frozen=True)
class Config:
    """Settings of the timings.

    Attributes:
        data: data set of the trained network: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: folder of the data; see :meth:`benchmarks.training.data.Dataset.load`.
        out: folder for numbers and figures.
        seed: seed of initialisations and random vectors.
        device: ``"cpu"`` or ``"cuda"``; by default the GPU if there is one.
        repeats: number of interleaved repeats; the median is reported.
        cpu_time: whether ``eigenvalues``, ``spectrum``, ``models`` and ``tracking`` measure CPU time of
            this process instead of elapsed time, for a machine with other load.
        sizes: numbers of samples in the comparison of products.
        n: number of training images, which are also the probe set.
        lr: learning rate of gradient descent.
        target_loss: training loss at which it stops.
        tol: certified residual relative to the eigenvalue.
        every: steps between measurements when tracking.
        max_overhead: limit on the share of training time when tracking.
        segments: number of pairs of segments with and without tracking.
        segment_steps: steps of a segment.
        warm_up: untimed steps before the first segment.
    """

    data: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("benchmarks/results")
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 5
    cpu_time: bool = False
    sizes: tuple[int, ...] = (100, 1000, 10_000)
    n: int = 1000
    lr: float = 1.0
    target_loss: float = 1e-3
    tol: float = 1e-3
    every: int = 50
    max_overhead: float = 0.05
    segments: int = 7
    segment_steps: int = 100
    warm_up: int = 200

    @property
    def clock(self) -> Callable[[], float]:
        """The clock in seconds: this process's CPU time, or elapsed time."""
        return time.process_time if self.cpu_time else time.perf_counter


@dataclass(frozen=True)
class Timing:
    """The seconds of repeated calls, and the result of the last one."""

    seconds: tuple[float, ...]
    result: Any

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return median(self.seconds)


def once(
    function: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter
) -> Timing:
    """Time one call by ``clock``, including the device's work."""
    _wait(device)
    start = clock()
    result = function()
    _wait(device)
    return Timing((clock() - start,), result)


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    device: str,
    called_before: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each function ``repeats`` times, in turns, so that drifts in speed affect all alike.

    Each function is first called once as a warm-up, unless ``called_before``.

    >>> timings = interleaved({"a": lambda: 1, "b": lambda: 2}, repeats=3, device="cpu")
    >>> timings["b"].result, len(timings["a"].seconds)
    (2, 3)
    """
    for function in functions.values():
        if not called_before:
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, function in functions.items():
            timing = once(function, device, clock)
            seconds[name] += timing.seconds
            results[name] = timing.result
    return {name: Timing(tuple(seconds[name]), results[name]) for name in functions}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def machine(device: str) -> dict[str, Any]:
    """Return the machine's description: device, threads and versions."""
    peers = ("curvlinops-for-pytorch", "PyHessian", "hessian-eigenthings", "scipy")
    versions = {name: _version(name) for name in peers}
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: version for name, version in versions.items() if version is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(path: Path, rows: Any, device: str) -> None:
    """Write ``rows`` and the machine's description as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=2) + "\n")
    os.replace(partial, path)


def random_data(
    config: Config, n: int, shape: tuple[int, ...], outputs: int
) -> tuple[Tensor, Tensor]:
    """Return uniform inputs and targets on the device, drawn from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.rand((n, *shape), generator=generator)
    y = torch.rand((n, outputs), generator=generator)
    return x.to(config.device), y.to(config.device)


Columns = Mapping[str, Iterable[Any]]
"""The columns of a table by heading; numbers are shown with four digits."""


def show(console: Console, title: str, columns: Columns) -> None:
    """Print columns as a table."""
    lines = Table(title=title)
    for heading in columns:
        lines.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    for values in zip(*columns.values(), strict=True):
        lines.add_row(*map(cell, values))
    console.print(lines)


def report(
    config: Any, console: Console, name: str, title: str, columns: Columns, rows: list[Any]
) -> list[Any]:
    """Print a table, write the rows to ``perf-NAME.json``, and return them."""
    show(console, title, columns)
    write(config.out / f"perf-{name}.json", rows, config.device)
    return rows
