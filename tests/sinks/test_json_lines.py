"""Records as lines of strict JSON."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from stableopt import JSONLinesSink, StabilityMargins, plot
from stableopt.sinks import Measured
from stableopt.stability import Layers, QuantityResult


def strictly(text: str) -> Any:
    """Parse JSON and refuse the NaN and Infinity that Python would let pass."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list[Any]:
    return [strictly(line) for line in path.read_text().splitlines()]


def test_numbers_come_back_exactly_in_order(tmp_path: Path) -> None:
    """Catches rounding, a lost or reordered record, and a missing parent folder."""
    sink = JSONLinesSink(tmp_path / "a" / "b" / "run.jsonl")
    records = [{"sharpness": 1 / 3, "loss": 1e-300 * k} for k in range(5)]
    for step, record in enumerate(records):
        sink(step, record)
    assert lines(sink.path) == [{"step": k, **record} for k, record in enumerate(records)]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Catches an error that comes only with the first record, in the middle of training."""
    with pytest.raises(ValueError, match="expected a file, and it is a folder"):
        JSONLinesSink(tmp_path)


def test_infinity_and_nan_are_null(tmp_path: Path) -> None:
    """Catches ``Infinity`` in the file, which only Python's parser reads."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    sink(1, {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 2.0})
    assert lines(sink.path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 2.0}]


def test_a_run_that_continues_appends(tmp_path: Path) -> None:
    """Catches a second sink that truncates what the first has written."""
    for step in (1, 2):
        JSONLinesSink(tmp_path / "run.jsonl")(step, {"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == [1, 2]


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    """Catches a record appended to the incomplete line that a crash left."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    JSONLinesSink(path)(3, {"loss": 0.5})
    first, stump, last = path.read_text().splitlines()
    assert (strictly(first), stump) == ({"step": 1}, '{"step": 2, "lo')
    assert strictly(last) == {"step": 3, "loss": 0.5}


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """Catches buffered writing: a crash would lose the records that explain it."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    for step in range(3):
        sink(step, StabilityMargins(sharpness=1.0).record())
        assert len(lines(sink.path)) == step + 1


def test_a_failed_measurement_is_a_line_without_values(tmp_path: Path) -> None:
    """Catches failures that vanish from the file, or that have invented values."""
    sink = JSONLinesSink(str(tmp_path / "run.jsonl"))
    sink(7, StabilityMargins(step=7, lr=0.1, failure="the loss is nan").record())
    (line,) = lines(sink.path)
    assert (line["step"], line["failed"], line["lr"]) == (7, 1.0, 0.1)
    assert "sharpness" not in line


def test_layers_are_numbers_by_name(tmp_path: Path) -> None:
    """Catches layers lost on the way, not strict JSON, and a figure that cannot read them."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    columns = {"share": (1 / 3, 2 / 3), "sharpness": (math.inf, 2.0), "limit": (4.0, None)}
    result = QuantityResult(3.0, layers=Layers(("embed", "head"), (2, 4), columns))
    margins = StabilityMargins(step=4, results={"sharpness": result})
    sink.receive(Measured(4, margins))
    sink.receive(Measured(5, StabilityMargins(step=5, sharpness=1.0)))
    first, second = lines(sink.path)
    assert first["sharpness"] == 3.0
    assert first["by_layer"] == {
        "embed": {"share": 0.333333, "sharpness": None, "limit": 4.0},
        "head": {"share": 0.666667, "sharpness": 2.0, "limit": None},
    }
    assert "by_layer" not in second
    for history in ([margins], [first, second]):
        (mesh,) = plot.layers(history).axes[0].collections
        assert mesh.get_array().ravel().tolist() == pytest.approx([1 / 3, 2 / 3], rel=1e-5)


def test_notes_are_lines_of_their_own(tmp_path: Path) -> None:
    """Catches a reason in words that breaks the file for readers of numbers."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    sink(1, {"decision": 1.0, "lr_to": math.inf})
    sink.note(1, 'raise lr: "why"\nand on')
    lines = [json.loads(line) for line in sink.path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "decision": 1.0, "lr_to": None},
        {"step": 1, "note": 'raise lr: "why"\nand on'},
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource")
def test_a_full_disk_costs_only_its_own_records(tmp_path: Path) -> None:
    """Catches a short write without an error, and the next record on the line that it cut."""
    import resource

    sink = JSONLinesSink(tmp_path / "run.jsonl")
    sink(1, {"sharpness": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sink.path.stat().st_size + 10, hard))
        for step in (2, 3):
            with pytest.raises(OSError, match=r"bytes were written|File too large"):
                sink(step, {"sharpness": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    sink(4, {"sharpness": 1.0})
    whole = [line for line in sink.path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in whole] == [1, 4]


def test_a_relative_path_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two halves of a run in two folders, after a change of the working directory."""
    monkeypatch.chdir(tmp_path)
    sink = JSONLinesSink("logs/run.jsonl")
    sink(1, {"sharpness": 1.0})
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    sink(2, {"sharpness": 1.0})
    assert [line["step"] for line in lines(tmp_path / "logs" / "run.jsonl")] == [1, 2]
    assert not (tmp_path / "sub" / "logs").exists()
