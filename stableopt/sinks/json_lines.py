"""`JSONLinesSink`: appends each record to a file, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["JSONLinesSink"]


class JSONLinesSink:
    """Appends each record to a file, as one JSON object a line.

    A line is ``{"step": …, "sharpness": …, …}``. The file is open only while a record is written, so
    that all records survive a crash, and processes that fork share no handle. Every line is strict
    JSON, which has neither infinity nor NaN: both are written as ``null``. So a limit of ``null`` means
    "no limit", and a limit that is absent was not known.

    An existing file is appended to, so that a resumed run continues it. A last line that a crash cut
    short stays as it is, and the next record begins on a new line.

    Args:
        path: the file; its folder is created with the first record.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = JSONLinesSink(Path(folder) / "run" / "margins.jsonl")
    ...     sink(50, {"sharpness": 15.0, "non_uniformity_limit": math.inf})
    ...     print(sink.path.read_text(), end="")
    {"step": 50, "sharpness": 15.0, "non_uniformity_limit": null}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._began = False

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Append ``record``, measured at ``step``."""
        numbers = {name: float(value) for name, value in record.items()}
        self._append(
            {"step": int(step)}
            | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        )

    def note(self, step: int, text: str) -> None:
        """Append ``text``, a decision at ``step`` and its reason, as ``{"step": …, "note": …}``."""
        self._append({"step": int(step), "note": text})

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False) + "\n"
        if not self._began:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = _line_break(self.path) + text
        # One write of bytes: where several processes append, lines do not mix.
        try:
            file = self.path.open("ab", buffering=0)
        except FileNotFoundError:  # the folder was removed meanwhile
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
        with file:
            file.write(text.encode())
        self._began = True

    def __repr__(self) -> str:
        return f"JSONLinesSink({str(self.path)!r})"


def _line_break(path: Path) -> str:
    """Return what must precede a new line: nothing, unless the last one was cut short."""
    if not path.exists() or path.stat().st_size == 0:
        return ""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return "" if file.read() == b"\n" else "\n"
