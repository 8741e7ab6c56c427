"""`JSONLinesSink`: appends each record to a file, one JSON object a line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableopt.sinks.events import Event, Measured
from stableopt.stability.layers.table import Layers

__all__ = ["JSONLinesSink"]


class JSONLinesSink:
    """Appends each record to a file, as one JSON object a line.

    A line is ``{"step": …, "sharpness": …, …}``. Measured layers are in the entry ``by_layer``, such as
    ``line["by_layer"]["blocks.3.mlp"]["share"]``, rounded to six digits. The file is open only while a
    record is written, so all records survive a crash, and forked processes share no handle. Every line
    is strict JSON: infinity and NaN, which JSON lacks, are ``null``. A limit of ``null`` means "no
    limit", and an absent limit is unknown.

    A resumed run appends to the existing file. If a crash cut the last line short, it stays as it is,
    and the next record starts on a new line.

    Args:
        path: the file; its folder is created with the first record. A relative path belongs to the
            present working directory.

    Raises:
        ValueError: if the path is that of a folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = JSONLinesSink(Path(folder) / "run" / "margins.jsonl")
    ...     sink(50, {"sharpness": 15.0, "non_uniformity_limit": math.inf})
    ...     print(sink.path.read_text(), end="")
    {"step": 50, "sharpness": 15.0, "non_uniformity_limit": null}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()  # the program may change its working directory
        if self.path.is_dir():
            raise ValueError(f"path={str(path)!r}: expected a file, and it is a folder")
        self._has_written = False

    def receive(self, event: Event) -> None:
        """Append a measurement with its layers, or a decision and its reason."""
        line = _line(event.step, event.record())
        if isinstance(event, Measured) and event.margins.layers is not None:
            line["by_layer"] = _by_layer(event.margins.layers)
        self._append(line)
        if not isinstance(event, Measured):
            self.note(event.step, str(event.decision))

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Append ``record``, measured at ``step``."""
        self._append(_line(step, record))

    def note(self, step: int, text: str) -> None:
        """Append ``text``, a decision at ``step`` and its reason, as ``{"step": …, "note": …}``."""
        self._append({"step": int(step), "note": text})

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False) + "\n"
        if not self._has_written:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = _line_break(self.path) + text
        # A single unbuffered write: the lines of several processes do not mix.
        try:
            file = self.path.open("ab", buffering=0)
        except FileNotFoundError:  # something removed the folder after the first record
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
        encoded = text.encode()
        self._has_written = False  # after an error the line may be cut short
        with file:
            written = file.write(encoded)
        if written != len(encoded):
            raise OSError(errno.ENOSPC, f"only {written} of {len(encoded)} bytes were written")
        self._has_written = True

    def __repr__(self) -> str:
        return f"JSONLinesSink({str(self.path)!r})"


def _line(step: int, record: Mapping[str, float]) -> dict[str, Any]:
    numbers = {name: float(value) for name, value in record.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return {"step": int(step), **finite}


def _by_layer(layers: Layers) -> dict[str, dict[str, float | None]]:
    columns = {name: layers.column(name) for name in layers.columns if name != "converged"}
    return {
        layer: {name: _rounded(values[row]) for name, values in columns.items()}
        for row, layer in enumerate(layers.names)
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _line_break(path: Path) -> str:
    """Return a line break if the last line was cut short, else nothing."""
    if not path.exists() or path.stat().st_size == 0:
        return ""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return "" if file.read() == b"\n" else "\n"
