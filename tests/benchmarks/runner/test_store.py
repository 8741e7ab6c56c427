"""The store of results: complete folders have no suffix, the others hold failures; JSON is strict."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from runner_jobs import Number, Walk

from benchmarks.runner import Place, Store
from benchmarks.runner.execute import work
from benchmarks.runner.files import plain, read_json, read_lines, write_json


def test_a_job_is_done_with_the_rename_and_not_before(tmp_path: Path) -> None:
    """Catches a job that counts as done while files are missing, or after it has failed."""
    store, job = Store(tmp_path), Number(1.0)
    store.part(job).mkdir(parents=True)
    write_json(store.part(job) / "result.json", {"value": 1})
    assert not store.done(job)
    store.fail(job, "E: no", "where")
    assert not store.done(job)
    assert store.failure(job) == {"error": "E: no", "details": "where"}
    with pytest.raises(FileNotFoundError):
        store.result(job)
    store.clear_failure(job)
    assert store.failure(job) is None
    store.finish(job)
    assert store.done(job)
    assert store.result(job) == {"value": 1}
    assert not store.part(job).exists()


def test_a_failure_can_be_recorded_before_there_is_a_folder(tmp_path: Path) -> None:
    """Catches a worker's death before its first file that is not recorded."""
    store = Store(tmp_path)
    store.fail(Number(1.0), "gone")
    assert store.failure(Number(1.0)) == {"error": "gone", "details": ""}
    store.clear_failure(Number(2.0))  # nothing to forgive


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file that is written in place: a reader would see half of it."""
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    replaced = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        replaced.append((read_json(target), read_json(source)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_json(path, {"a": 2})
    assert replaced == [({"a": 1}, {"a": 2})]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError, match="Tensor"):
        write_json(path, {"a": torch.zeros(1)})
    assert read_json(path) == {"a": 2}


def test_what_is_done_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a job marked as done before its files are on the disk: a power cut would lose them."""
    if os.name != "posix":
        pytest.skip("fsync of a folder is POSIX's")
    store, job = Store(tmp_path), Number(1.0)
    synced: set[int] = set()
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(source: Path, target: Path) -> None:
        inside = list(source.iterdir()) if source.is_dir() else []
        if target.name != "progress.json":
            assert {path.stat().st_ino for path in (source, *inside)} <= synced, target
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    work([Walk(0, steps=12)], tmp_path, Place())
    assert store.done(Walk(0, steps=12))
    store.fail(job, "no")
    assert store.failure(job) is not None


def test_json_has_no_numbers_that_json_does_not_know() -> None:
    """Catches NaN and Infinity in a file, which other readers refuse, at any depth."""
    value = {
        "a": (math.nan, [math.inf, {"b": -math.inf}]),
        3: np.float64(0.5),
        "c": None,
        "d": True,
    }
    assert plain(value) == {"a": [None, [None, {"b": None}]], "3": 0.5, "c": None, "d": True}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == plain(value)


def test_a_line_that_was_cut_short_is_not_read(tmp_path: Path) -> None:
    """Catches an error, or half a record, from a trace whose process was killed as it wrote."""
    path = tmp_path / "trace.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
