"""`Place`: the device, data folder and threads that a job runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """Where a job runs; not part of its configuration.

    Attributes:
        device: device of the tensors.
        data_dir: folder of the data; see :meth:`benchmarks.training.data.Dataset.load`.
        threads: torch threads in each worker; ``None`` keeps torch's setting.
    """

    device: str = "cpu"
    data_dir: Path | None = None
    threads: int | None = None
