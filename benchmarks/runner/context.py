"""`Work`: what a running job can use: results it needs, a folder, a trace, checkpoints."""

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
    """What a running job can use: its place, the results it needs, and a folder to write to.

    Attributes:
        place: where it runs.
        folder: its own, for any other file to keep.
    """

    def __init__(self, job: Named, store: Store, place: Place) -> None:
        self.place = place
        self.folder = store.part(job)
        self._store = store
        self._noted = 0.0
        self._trace_path = self.folder / "trace.jsonl"
        self._checkpoint_path = self.folder / "checkpoint.pt"

    def result(self, need: Named) -> Any:
        """Return the result of a job that this one needs."""
        return self._store.result(need)

    def tensors(self, need: Named) -> dict[str, Tensor]:
        """Return the tensors that were saved by a job that this one needs."""
        return self._store.tensors(need)

    def trace(self, **record: Any) -> None:
        """Append a line to ``trace.jsonl``, at once."""
        line = json.dumps(plain(record), allow_nan=False, ensure_ascii=False)
        with self._trace_path.open("a") as file:
            file.write(line + "\n")

    def progress(self, share: float, text: str = "") -> None:
        """Report the share of the work that is done, from 0 to 1. Cheap: call it at every step."""
        now = time.monotonic()
        if now - self._noted >= PROGRESS_EVERY:
            self._noted = now
            progress = {"share": share, "text": text}
            write_json(self.folder / "progress.json", progress, durable=False)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Keep tensors for the jobs that need this one."""
        torch.save(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            self.folder / "tensors.pt",
        )

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Save a state to continue from if the process is killed: tensors and plain values."""
        self._trace_path.touch()
        length = self._trace_path.stat().st_size
        partial = self._checkpoint_path.with_suffix(".partial")
        torch.save({"state": state, "trace": length}, partial)
        to_disk(self._trace_path)
        to_disk(partial)
        os.replace(partial, self._checkpoint_path)

    def restored(self) -> dict[str, Any] | None:
        """Return the last checkpoint, and cut the trace back to where it was then.

        Without a checkpoint, return ``None`` and empty the trace.
        """
        self._trace_path.touch()
        if not self._checkpoint_path.exists():
            os.truncate(self._trace_path, 0)
            return None
        kept = torch.load(self._checkpoint_path, weights_only=True, map_location=self.place.device)
        os.truncate(self._trace_path, kept["trace"])
        state: dict[str, Any] = kept["state"]
        return state

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint: it may have caused the error."""
        self._checkpoint_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files that only the running job needed."""
        for name in ("checkpoint.pt", "progress.json", "failed.json"):
            (self.folder / name).unlink(missing_ok=True)
        for left in self.folder.glob("*.partial"):  # by a process killed while it wrote
            left.unlink()
