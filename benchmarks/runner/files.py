"""Atomic, durable writes of JSON files, and their reading."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

__all__ = ["plain", "read_json", "read_lines", "to_disk", "write_json"]


def plain(value: Any) -> Any:
    """Return ``value`` in JSON's types; non-finite numbers become ``None``.

    >>> plain({"a": (1, float("inf"))})
    {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write a JSON file atomically; if ``durable``, it survives a power failure."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(
        json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    )
    if durable:
        to_disk(partial)
    os.replace(partial, path)


def to_disk(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
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
    """Return the records of a JSON Lines file, without an incomplete last line."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1:] == "\n"
    ]
