"""JSON files that are complete or absent, even after a crash."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["plain", "read_json", "read_lines", "to_disk", "write_json"]


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types: numbers that are not finite become ``None``.

    >>> plain({"a": (1, float("inf"))})
    {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write a file atomically; if ``durable``, a power cut does not lose it either."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(
        json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    )
    if durable:
        to_disk(partial)
    os.replace(partial, path)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, without an incomplete last one."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]
