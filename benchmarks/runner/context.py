"""`Work`: a running job's access to its inputs, its folder, its trace and its checkpoints."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.files import plain, to_disk, write_json
from benchmarks.runner.place import Place
from benchmarks.runner.store import Named, Store

__all__ = ["PROGRESS_EVERY", "Work"]

PROGRESS_EVERY = 1.0
"""Seconds between two updates of a job's progress file."""


class Work:
    """A running job's access to the store.

    Attributes:
        place: device, data folder and threads.
        folder: the job's folder; other files in it are kept.
    """

    def __init__(self, job: Named, store: Store, place: Place) -> None:
        self.place = place
        self.folder = store.part(job)
        self._store = store
        self._last_progress = 0.0
        self._began, self._seconds_before = _clocks(), 0.0
        self._trace_path = self.folder / "trace.jsonl"
        self._checkpoint_path = self.folder / "checkpoint.pt"

    @property
    def seconds(self) -> float:
        """The seconds of work on the job, with those before the checkpoint from which it resumed.

        On a CPU, time in which the process was paused or waited for a core does not count.
        """
        wall, cpu = (now - then for now, then in zip(_clocks(), self._began, strict=True))
        on_cpu = torch.device(self.place.device).type == "cpu"
        return self._seconds_before + (min(wall, cpu) if on_cpu else wall)

    def result(self, need: Named) -> Any:
        """Return the result of a job that this one needs."""
        return self._store.result(need)

    def tensors(self, need: Named) -> dict[str, Tensor]:
        """Return the tensors saved by a job that this one needs."""
        return self._store.tensors(need)

    def trace(self, **record: Any) -> None:
        """Append a line to ``trace.jsonl`` immediately."""
        line = json.dumps(plain(record), allow_nan=False, ensure_ascii=False)
        with self._trace_path.open("a") as file:
            file.write(line + "\n")

    def progress(self, share: float, text: str = "") -> None:
        """Report the share of the work done, from 0 to 1. Cheap enough to call at every step."""
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_EVERY:
            self._last_progress = now
            progress = {"share": share, "text": text}
            write_json(self.folder / "progress.json", progress, durable=False)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Save tensors for the jobs that need this one."""
        torch.save(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            self.folder / "tensors.pt",
        )

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Save a state of tensors and plain values, from which a killed job resumes."""
        self._trace_path.touch()
        length = self._trace_path.stat().st_size
        partial = self._checkpoint_path.with_suffix(".partial")
        torch.save({"state": state, "trace": length, "seconds": self.seconds}, partial)
        to_disk(self._trace_path)
        to_disk(partial)
        os.replace(partial, self._checkpoint_path)

    def restored(self) -> dict[str, Any] | None:
        """Return the last checkpoint, and truncate the trace to its length at that time.

        Without a checkpoint, empty the trace and return ``None``.
        """
        self._trace_path.touch()
        if not self._checkpoint_path.exists():
            os.truncate(self._trace_path, 0)
            return None
        checkpoint = torch.load(
            self._checkpoint_path, weights_only=True, map_location=self.place.device
        )
        os.truncate(self._trace_path, checkpoint["trace"])
        self._began, self._seconds_before = _clocks(), checkpoint.get("seconds", 0.0)
        state: dict[str, Any] = checkpoint["state"]
        return state

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint, which may have caused the error."""
        self._checkpoint_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files that only the running job needs."""
        for name in ("checkpoint.pt", "progress.json", "failed.json"):
            (self.folder / name).unlink(missing_ok=True)
        for partial in self.folder.glob("*.partial"):  # left by a process killed while writing
            partial.unlink()


def _clocks() -> tuple[float, float]:
    """Return the present wall time and CPU time of this process."""
    return time.perf_counter(), time.process_time()
