"""`Place`: the device, data folder and threads that a job runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Where a job is run; no part of what it is.

    Attributes:
        device: that tensors lie on.
        data_dir: where the data are; see :func:`benchmarks.training.data.load`.
        threads: of torch in each worker; ``None`` leaves it.
    """

    device: str = "cpu"
    data_dir: Path | None = None
    threads: int | None = None
