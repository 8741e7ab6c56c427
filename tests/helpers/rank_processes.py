"""Runs of a function on several ranks of a gloo group, each in its own process."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# Forked from a server that has imported torch but never used autograd: a fork of a process that has
# used it cannot differentiate, and a fresh interpreter takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "stableopt"]
)

NEEDS_FSDP_ON_CPU = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch before 2.7 has fully_shard on accelerators alone"
)

TIMEOUT = 150
"""Seconds after which a run counts as hanging."""


def run(
    worker: Callable[..., Any], size: int, folder: Path, *args: Any, answer_in: float = 60.0
) -> list[Any]:
    """Return what ``worker(*args)`` returns on each of ``size`` ranks, as JSON; ``None`` if it died.

    ``answer_in`` is the timeout of the group, in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_rank, args=(worker, rank, size, str(folder), answer_in, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} still ran after {TIMEOUT} s"
    paths = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def run_script(path: Path, size: int, folder: Path) -> list[str]:
    """Return what each of ``size`` ranks prints that run ``path`` in torchrun's environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_script, args=(str(path), rank, size, port, str(folder)))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * size
    return [(folder / f"{rank}.txt").read_text() for rank in range(size)]


def _script(path: str, rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
    )
    with Path(folder, f"{rank}.txt").open("w") as out, contextlib.redirect_stdout(out):
        runpy.run_path(path, run_name="__main__")


def _rank(
    worker: Callable[..., Any], rank: int, size: int, folder: str, answer_in: float, args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=answer_in),
    )
    found = worker(*args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def shard(samples: int, rank: int, size: int) -> slice:
    """Return this rank's share of the samples; later ranks have larger shares."""
    ends = [samples * r * (r + 1) // (size * (size + 1)) for r in range(size + 1)]
    return slice(max(ends[rank], rank), max(ends[rank + 1], rank + 1))
