"""`read_run`: which lines and reports are of one run, and that runs are never mixed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from report_files import alarm, margins, write

from stableopt.__main__ import main
from stableopt.report import read_run


@pytest.fixture(autouse=True)
def without_figures() -> Iterator[None]:
    """Reports without figures, which take most of the time."""
    with mock.patch("importlib.util.find_spec", return_value=None):
        yield


def test_the_reports_of_two_runs_are_no_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a page that mixes the alarms of runs without JSON lines."""
    for run in ("a", "b"):
        alarm(tmp_path / run / "reports")
    with pytest.raises(ValueError, match="found several: a/reports, b/reports; pass one"):
        read_run(tmp_path)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "pass one" in capsys.readouterr().err
    for part in ("a", "a/reports"):
        assert len(read_run(tmp_path / part).reports) == 1


def test_a_diverged_run_is_not_hidden_by_a_healthy_one(tmp_path: Path) -> None:
    """Catches the report of a run without JSON lines that counts as replaced by a run that has them."""
    alarm(tmp_path / "diverged" / "reports", loss=9.0)
    lines = write(tmp_path / "fine", margins(2), margins(4))
    with pytest.raises(ValueError, match=r"fine/margins\.jsonl, diverged/reports; pass one"):
        read_run(tmp_path)
    run = read_run(lines)
    assert (len(run.records), run.reports, run.superseded, run.skipped) == (2, [], 0, [])


def test_reports_belong_to_the_nearest_lines_above_them(tmp_path: Path) -> None:
    """Catches the page of a file of lines that has the alarms of runs in folders below."""
    lines = write(tmp_path, margins(2), margins(4))
    alarm(tmp_path / "flight")
    write(tmp_path / "other", margins(2), margins(4))
    alarm(tmp_path / "other" / "flight" / "deep")
    assert len(read_run(lines).reports) == 1
    with pytest.raises(ValueError, match=r"margins\.jsonl, other/margins\.jsonl; pass one"):
        read_run(tmp_path)


def test_logs_and_reports_next_to_each_other_are_one_run(tmp_path: Path) -> None:
    """Catches a refusal of lines and reports in two folders of a run, also of one that was repeated;
    and the report of a run that shares only the steps.
    """
    write(tmp_path / "logs", margins(2), margins(4))
    alarm(tmp_path / "reports")
    assert len(read_run(tmp_path).reports) == 1
    write(tmp_path / "logs", margins(1), margins(2, loss=0.5), margins(4, loss=0.5))
    run = read_run(tmp_path)
    assert (run.reports, run.superseded, run.skipped) == ([], 3, [])
    alarm(tmp_path / "reports", loss=7.0)
    run = read_run(tmp_path)
    assert (run.reports, run.superseded) == ([], 3)
    (skipped,) = run.skipped
    assert skipped.endswith("step-5-2/report.json: its measurements are those of another run")


def test_runs_in_one_folder_have_the_alarms_of_their_measurements(tmp_path: Path) -> None:
    """Catches the alarm of another file's run in the same folder."""
    first = write(tmp_path, margins(2), margins(4))
    first = first.rename(tmp_path / "first.jsonl")
    second = write(tmp_path, margins(2, loss=9.0), margins(4, loss=9.0))
    alarm(tmp_path, loss=9.0)
    assert [len(read_run(lines).reports) for lines in (first, second)] == [0, 1]


@pytest.mark.parametrize("name", ["notes.txt", "log.jsonl"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    """Catches the page of a text file, made from all runs in its folder."""
    alarm(tmp_path / "run")
    file = tmp_path / name
    file.write_text('{"epoch": 1}\nlearning rate 0.1\n')
    with pytest.raises(ValueError, match="expected lines of a JSONLinesSink, and it has none"):
        read_run(file)
