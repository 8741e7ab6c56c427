"""Records in a real, offline run of Weights & Biases."""

from __future__ import annotations

import gc
import json
import math
import struct
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stableopt import WandbSink

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def parts(path: Path) -> Iterator[bytes]:
    """Yield the records of a run's file: LevelDB's log format, after a header of seven bytes."""
    data, record = path.read_bytes(), b""
    for start in range(0, len(data), 32768):
        offset, end = start or 7, min(start + 32768, len(data))
        while end - offset >= 7:
            _, length, kind = struct.unpack_from("<IHB", data, offset)
            if kind == 0:  # padding
                break
            record += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield record
                record = b""


def records(folder: Path) -> list[Any]:
    """Return what the run in ``folder`` wrote, as far as it is in its file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    parsed = []
    for part in parts(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(part)
        parsed.append(record)
    return parsed


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that the run in ``folder`` wrote, which is finished."""
    # Another process writes the file, and may not be done when finish() returns.
    end = time.monotonic() + 30
    while True:
        written = records(folder)
        if any(r.WhichOneof("record_type") == "exit" for r in written):
            break
        assert time.monotonic() < end, "the run's file does not end"
        time.sleep(0.1)
    rows = [r.history.item for r in written if r.WhichOneof("record_type") == "history"]
    return [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row} for row in rows
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    settings = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True
    )
    run = wandb.init(project="test", mode="offline", dir=tmp_path, settings=settings)
    yield run
    run.finish()


@pytest.mark.parametrize("named", [True, False])
def test_records_are_rows_beside_those_of_training(run: Any, tmp_path: Path, named: bool) -> None:
    """Catches a record merged into another, an infinite value, and lost rows of training."""
    sink = WandbSink(run) if named else WandbSink()
    for step in range(1, 5):
        if step % 2 == 0:
            sink(step, {"sharpness": 1 / step, "non_uniformity_limit": math.inf})
        run.log({"loss": 1.0 * step}, step=step)
    sink.note(4, "lower the rate")
    run.finish()
    rows = logged(tmp_path)
    margins = {
        r["stability/step"]: r["stability/sharpness"] for r in rows if "stability/sharpness" in r
    }
    assert margins == {2: 0.5, 4: 0.25}
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 2.0, 3.0, 4.0]
    assert "non_uniformity" not in str(rows)
    assert rows[-1]["stability/note"] == "lower the rate"


@pytest.mark.parametrize(("every", "decides"), [(1, False), (2, True)])
def test_rows_of_training_survive(run: Any, tmp_path: Path, every: int, decides: bool) -> None:
    """Catches a record that moves the run's step past that of training's next row.

    Training steps begin at 0; a measurement and two decisions come between two of them.
    """
    sink = WandbSink(run)
    for step in range(6):
        if (step + 1) % every == 0:
            sink(step + 1, {"sharpness": float(step)})
            for what in ("lr", "batch size") if decides else ():
                sink(step + 1, {"decision": 1.0})
                sink.note(step + 1, f"raise {what}")
        run.log({"loss": float(step)}, step=step)
    run.finish()
    rows = logged(tmp_path)
    assert [row["_step"] for row in rows if "loss" in row] == list(range(6))
    measured = [row for row in rows if "stability/step" in row]
    assert [row["stability/step"] for row in measured] == list(range(every, 7, every))
    assert all("stability/sharpness" in row for row in measured)
    if decides:
        assert {row["stability/note"] for row in measured} == {"raise lr\nraise batch size"}


def test_records_of_two_monitors_are_rows_of_their_own(run: Any, tmp_path: Path) -> None:
    """Catches a record that replaces the one of another monitor, or of the step before."""
    sinks = [WandbSink(run), WandbSink(run)]
    for step in (1, 2):
        for number, sink in enumerate(sinks):
            sink(step, {"sharpness": float(number)})
    run.finish()
    rows = logged(tmp_path)
    values = [(r["stability/step"], r["stability/sharpness"]) for r in rows]
    assert values == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_sink_made_where_another_was_has_a_row_of_its_own() -> None:
    """Catches a record that replaces that of a sink which no longer exists, where a new sink has its
    place in memory, and a run that its sinks keep in memory.
    """

    class Run:
        step, commits = 0, 0

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            pass

        def log(self, data: dict[str, Any], commit: bool = False) -> None:
            self.commits += commit

    run = Run()
    for value in range(20):
        WandbSink(run)(1, {"sharpness": float(value)})  # gone at once
    assert run.commits == 19
    kept = weakref.ref(run)
    del run
    gc.collect()
    assert kept() is None


def test_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that does not say that a run is missing."""
    with pytest.raises(RuntimeError, match=r"no run is active; expected wandb\.init\(\)"):
        WandbSink()(1, {"sharpness": 1.0})
    with pytest.raises(TypeError, match=r"run='demo': expected what wandb\.init"):
        WandbSink("demo")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install stableopt\[wandb\]"):
        WandbSink()(1, {"sharpness": 1.0})
