"""Reports of the flight recorder: their shares, and what they hold where one of their parts fails."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from recorded_runs import LOSS, Run, data
from torch import nn

import stableopt
from stableopt import FlightRecorder, StabilityMargins, StabilityMonitor
from stableopt.recorder import Alarm, Evidence, StepRecord, Verdict, flight_recorder
from stableopt.recorder.evidence import MeasuredRecord
from stableopt.recorder.report import write_report
from stableopt.report import read_run

pytestmark = pytest.mark.filterwarnings("ignore:the measurement at step:RuntimeWarning")


class Flag(IntEnum):
    ONE = 1


def alarm(run: Run, batch: Any = None, steps: int = 5) -> None:
    """Take steps whose losses are not finite."""
    for _ in range(steps):
        run.recorder.loss(torch.nan, batch)
        run.optimizer.step()


@pytest.mark.parametrize(
    ("batch", "kept"),
    [
        (np.arange(3), [0, 1, 2]),
        (list(np.arange(2)), [0, 1]),
        (np.array(["a", "b"]), ["a", "b"]),
        (list(torch.arange(2)), [0, 1]),
        (torch.tensor(3), [3]),
        ([np.float32(0.5), np.bool_(True), None], [0.5, True, None]),
        ([np.str_("c"), np.float64(0.25), Flag.ONE], ["c", 0.25, 1]),
        ("a.png", ["a.png"]),
        (["a\udcff.png"], ["a\udcff.png"]),
        (7, [7]),
        ((torch.ones(4, 8), np.ones((4, 2))), ["Tensor[4, 8]", "ndarray[4, 2]"]),
        ([1j, {1: 2}, (3, np.int64(4))], ["1j", "{1: 2}", [3, 4]]),
        (torch.ones(2, 2, dtype=torch.int64), [[1, 1], [1, 1]]),
        (range(10**9), list(range(1024))),
    ],
)
def test_batches_of_any_kind_reach_the_report(tmp_path: Path, batch: Any, kept: list[Any]) -> None:
    """Catches a report that is lost because JSON or UTF-8 cannot hold its batch identifiers."""
    run = Run(tmp_path, measure=False)
    with mock.patch("importlib.util.find_spec", return_value=None):  # without a figure
        alarm(run, batch)
    assert run.report()["evidence"]["steps"][0]["batch"] == kept
    assert (run.recorder.reports[0] / "report.md").stat().st_size > 100


def failing(*_: Any, **__: Any) -> None:
    raise RuntimeError("no\nway")


def fail_to_measure(run: Run) -> Any:
    return mock.patch.object(run.monitor, "measure", failing)


def fail_to_judge(run: Run) -> Any:
    return mock.patch.object(flight_recorder, "verdict", failing)


def fail_to_draw(run: Run) -> Any:
    return mock.patch.object(Figure, "savefig", failing)


def fail_to_save(run: Run) -> Any:
    return mock.patch.object(torch, "save", side_effect=OSError(28, "No space left on device"))


def fail_to_write_json(run: Run) -> Any:
    return mock.patch("stableopt.recorder.report.json.dumps", failing)


@pytest.mark.parametrize(
    ("fail", "part"),
    [
        (fail_to_measure, "the measurement at the alarm"),
        (fail_to_judge, "the cause"),
        (fail_to_draw, "report.png"),
        (fail_to_save, "last_good.pt"),
        (fail_to_write_json, "report.json"),
    ],
)
def test_a_part_that_fails_is_named_in_the_others(
    tmp_path: Path, fail: Callable[[Run], Any], part: str
) -> None:
    """Catches a report that is lost with one of its parts, and a part that is lost silently."""
    run = Run(tmp_path, keep_weights=True)
    run.train(10)
    with fail(run), pytest.warns(RuntimeWarning, match=f"step 11 lacks {part}"):
        alarm(run)
    (path,) = run.recorder.reports
    reason = "OSError: No space" if part == "last_good.pt" else "RuntimeError: no way"
    assert f"Missing: {part} ({reason}" in (path / "report.md").read_text()
    parts = {"report.json", "report.md", "report.png", "last_good.pt"} - {part}
    assert {file.name for file in path.iterdir()} == parts
    if part != "report.json":
        assert list(run.report()["missing"]) == [part]
        assert len(read_run(tmp_path).reports) == 1


def test_no_text_ends_a_cell_of_a_table(tmp_path: Path) -> None:
    """Catches an error of several lines, or a name with a bar, that breaks the tables of the report."""
    margins = StabilityMargins(step=2, failure="CUDA error: out of memory\n# of | the device")
    steps = [StepRecord(1, 0.1, 1.0, {"a|b": 1.0}, ["x|y\nz.png"])]
    evidence = Evidence(steps, [MeasuredRecord(margins)])
    path = write_report(
        tmp_path, Alarm("loss", 2, "the loss rose"), Verdict("unknown", ""), evidence
    )
    rows = [line for line in (path / "report.md").read_text().splitlines() if line.startswith("| ")]
    cells = [len(re.split(r"(?<!\\)\|", row)) for row in rows]
    assert cells == [7, 7, 7, 8, 8, 8]  # heading, rule and row of each table, with the ends
    assert any("out of memory # of \\| the device" in row for row in rows)
    assert any("x\\|y z.png" in row for row in rows)


def test_what_the_user_set_in_matplotlib_changes_no_report(tmp_path: Path) -> None:
    """Catches a figure that is drawn with the user's settings, here LaTeX, which is not installed."""
    run = Run(tmp_path, measure=False)
    with matplotlib.rc_context({"text.usetex": True}):
        alarm(run)
    assert (run.recorder.reports[0] / "report.png").exists()


def test_the_measurement_at_an_alarm_is_of_the_report_alone(tmp_path: Path) -> None:
    """Catches steering that acts on it, and later measurements with other seeds and warm starts: the
    recorder would change training.
    """
    rates, measured = [], []
    for record in (False, True):
        run = Run(tmp_path / str(record), record=record, measure=True)
        received: list[int] = []
        run.monitor.sinks.append(lambda step, _, steps=received: steps.append(step))
        target = stableopt.TargetRegion(sharpness=(0, 4.0))
        scheduler = stableopt.StabilityLR(run.optimizer, run.monitor, target)
        for step in range(40):
            run.train(1, spoil=50.0 if step == 24 else 1.0)
            scheduler.step()
        rates.append(scheduler.get_last_lr())
        measured.append([(m.step, m.sharpness) for m in run.monitor.history])
        assert received.count(25) + received.count(26) == record
    assert rates[0] == rates[1]
    assert measured[0] == measured[1]


def test_a_report_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    """Catches a failed report that is not tried again for 200 steps.

    Also catches a measurement or a warning at each attempt.
    """
    run = Run(tmp_path / "file" / "flight")
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning) as caught:
        alarm(run, steps=15)
    messages = [str(warning.message) for warning in caught]
    assert sum("could not be written" in message for message in messages) == 1
    assert len(run.recorder.evidence.measured) == 2  # that at the alarm, and that of step 10
    assert run.recorder.reports == []
    (tmp_path / "file").unlink()
    alarm(run)
    assert len(run.recorder.reports) == 1
    alarm(run)
    assert len(run.recorder.reports) == 1


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path: Path) -> None:
    """Catches a full disk or a typing error that ends the training, and a verdict that is lost with
    its report.
    """
    run = Run(tmp_path / "file" / "flight", window=20)
    (tmp_path / "file").write_text("")
    run.train(60)
    run.optimizer.param_groups[0]["lr"] = 3.0
    with pytest.warns(RuntimeWarning) as caught:
        run.train(60)
    (said,) = [str(warning.message) for warning in caught if "report" in str(warning.message)]
    place = re.escape(str(tmp_path / "file" / "flight"))
    assert re.fullmatch(
        rf"the report of step \d+ \(learning rate\) could not be written to {place}: Not a directory\. "
        r".* The learning rate rose from 0\.1 to 3 at step 61\..*",
        said,
    )


def test_a_disk_without_room_is_named_once(tmp_path: Path) -> None:
    """Catches the name of the error twice, and a second alarm, much later, whose verdict is lost."""
    run = Run(tmp_path, measure=False, window=30)
    full = mock.patch.object(Path, "write_text", side_effect=OSError("no room"))
    with full, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alarm(run)
        run.train(40)
        alarm(run)
    first, second = [str(warning.message) for warning in caught if "report" in str(warning.message)]
    assert "step 1 (not finite) could not be written" in first
    assert first.count("OSError") == 1
    assert "step 46 (not finite) could not be written" in second


def test_a_full_disk_leaves_what_fits(tmp_path: Path) -> None:
    """Catches a truncated file: on a full disk a file is complete or absent."""
    run = Run(tmp_path, keep_weights=True)
    run.train(10)

    def cut_short(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with mock.patch.object(torch, "save", cut_short), pytest.warns(RuntimeWarning, match="lacks"):
        alarm(run)
    names = {file.name for file in run.recorder.reports[0].iterdir()}
    assert names == {"report.json", "report.md", "report.png"}
    json.loads((run.recorder.reports[0] / "report.json").read_text())


@pytest.mark.parametrize("kind", [stableopt.LBFGS, torch.optim.AdamW])
def test_its_shares_are_those_of_the_margins(tmp_path: Path, kind: Any) -> None:
    """Catches shares of other coordinates, and any under L-BFGS, whose P connects the layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    x, y = data()
    optimizer = kind(model.parameters(), lr=0.1)
    with StabilityMonitor(optimizer, model, LOSS, (x, y), every=3) as monitor:
        recorder = FlightRecorder(monitor, tmp_path)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = LOSS(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        recorder.close()
    layers = monitor.history[-1].layers
    assert (layers is None) is (kind is stableopt.LBFGS)
    shares = {} if layers is None else dict(zip(layers.names, layers.column("share"), strict=True))
    assert recorder.evidence.measured[-1].shares == shares
    assert set(shares) == (set() if layers is None else {"0", "2"})
