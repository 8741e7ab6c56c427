"""The page of a run: what it shows, and that nothing of a run can break it."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import pytest
import torch
from report_files import alarm, margins, write
from torch import nn

from stableopt import JSONLinesSink, StabilityMonitor
from stableopt.__main__ import main
from stableopt.report import Run, notebook, page, read_run, write_page, writer
from stableopt.report.charts import charts, charts_of_report, heat_map, thinned
from stableopt.report.run import FlightReport
from stableopt.report.summary import rows, sentence
from stableopt.stability import StabilityMargins

HOSTILE = "<script>alert(1)</script>\"'&$\\x$"


class Elements(HTMLParser):
    """Collects tags, and attributes that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.loaded.append(str(value))


def test_the_page_shows_what_was_measured_and_loads_nothing(tmp_path: Path) -> None:
    """Catches a page without one of its parts, and a script, a font or a picture from elsewhere."""
    write(tmp_path, margins(50, 0.5), margins(100, 0.8), StabilityMargins(150, failure="no"))
    alarm(tmp_path / "flight")
    text = write_page(tmp_path).read_text()
    for part in ("16", "20", "0.8", "Latest margins", "sharpness / limit", "Layers in the top"):
        assert part in text
    shown = " ".join(re.sub("<[^>]*>", " ", text).split())
    assert "measurements 3 failed 1 not converged 0 alarms 1" in shown
    assert "At step 5 the loss of 2 rose; the likely cause: layer, seen in layer 2." in shown
    assert "2 90%, 0 10%" in shown
    assert [path.name for path in tmp_path.glob("*.html")] == ["report.html"]
    found = Elements(text)
    assert found.loaded == []
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text


def test_hostile_names_and_numbers_stay_text(tmp_path: Path) -> None:
    """Catches a name of the run that becomes HTML, or that matplotlib reads as a formula; and a
    number that no axis can show.
    """
    folder = tmp_path / HOSTILE.replace("/", "")
    path = write(folder, margins(50))
    known = {"failed": 0, "converged": 1, "loss": 1e308, "lr": "fast", f"{HOSTILE}_ratio": 2.0}
    with path.open("a") as file:
        file.write(json.dumps({"step": 60, **known}) + "\n")
        file.write(json.dumps({"step": 10**30, **known, "loss": 10**400}) + "\n")
    JSONLinesSink(path).note(70, f"note {HOSTILE}")
    alarm(folder, f"layer {HOSTILE}")
    text = write_page(folder).read_text()
    assert "script" not in Elements(text).tags
    for what in ("layer ", "note ", "<h1>", "<figcaption>"):
        assert f"{what}&lt;script&gt;" in text


def test_what_a_crash_leaves_is_read_over(tmp_path: Path) -> None:
    """Catches a reader that stops at a line cut short, at zeros, or at a broken report."""
    path = write(tmp_path, margins(50), margins(100))
    whole = path.read_bytes()
    other = b'[1]\n{"step": "five"}\n{"epoch": 3}\n\n' + b"[" * 100_000 + b"\n\0\0\xff\n"
    path.write_bytes(other + whole + whole[: len(whole) // 3])
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-9" / "report.json").write_text('{"alarm": {}')
    (tmp_path / "step-10").mkdir()
    (tmp_path / "step-10" / "report.json").write_text("[]")
    run = read_run(tmp_path)
    assert [record["step"] for record in run.records] == [50, 100]
    assert run.unreadable == 5
    assert sentence(run).startswith("Step 100 is inside")


def replaced(text: str, at: str, value: Any) -> str:
    """Return a report with another value at a place such as ``alarm.step``."""
    content = json.loads(text)
    *parents, last = at.split(".")
    place = content
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    return json.dumps(content)


@pytest.mark.parametrize("value", [math.inf, 10**400, None, "x", [1]])
@pytest.mark.parametrize(
    "at", ["alarm.step", "evidence.steps.0.step", "evidence.measured.0.margins.step"]
)
def test_a_report_with_impossible_steps_is_skipped_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture, at: str, value: Any
) -> None:
    """Catches a traceback, and a report that is left out silently."""
    with mock.patch("importlib.util.find_spec", return_value=None):  # figures take most of the time
        alarm(tmp_path, "b")
        (place,) = tmp_path.rglob("report.json")
        write(tmp_path, margins(50))
        place.write_text(replaced(place.read_text(), at, value))
        with pytest.raises(SystemExit):
            main(["report", str(tmp_path)])
    said = capsys.readouterr().err
    assert f"skipped {place}: not a report" in said
    assert "Traceback" not in said
    run = read_run(tmp_path)
    assert (len(run.records), len(run.reports), run.unreadable) == (1, 0, 1)


def test_infinite_numbers_make_a_page(tmp_path: Path) -> None:
    """Catches shares, sums and steps that no chart can show."""
    alarm(tmp_path, "b")
    (place,) = tmp_path.rglob("report.json")
    text = replaced(place.read_text(), "evidence.measured.0.shares", {"a": math.inf, "b": 10**400})
    place.write_text(text)
    known = '"failed": 0, "converged": 1, "seconds": 1e308, "by_layer": {"a": {"share": Infinity}}'
    steps = (5, 6, 10**400)
    (tmp_path / "margins.jsonl").write_text("".join(f'{{"step": {k}, {known}}}\n' for k in steps))
    assert "<html" in write_page(tmp_path).read_text()
    assert [record["step"] for record in read_run(tmp_path).records] == [5, 6]


@pytest.mark.skipif(os.name != "posix", reason="named pipes and links are POSIX's")
def test_pipes_folders_and_broken_links_are_skipped_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Catches a pipe whose reader never returns, and a folder or a broken link that ends the command."""
    strange = tmp_path / "strange"
    strange.mkdir()
    os.mkfifo(strange / "pipe.jsonl")
    (strange / "folder.jsonl").mkdir()
    (strange / "link.jsonl").symlink_to(tmp_path / "none")
    (strange / "step-3").mkdir()
    os.mkfifo(strange / "step-3" / "report.json")
    with pytest.raises(FileNotFoundError, match=r"skipped .*pipe\.jsonl: not a regular file"):
        read_run(strange)
    with pytest.raises(FileNotFoundError, match=r"pipe\.jsonl: not a regular file"):
        read_run(strange / "pipe.jsonl")
    write(strange, margins(50))
    assert main(["report", str(strange)]) == 0
    said = capsys.readouterr().err
    for name in ("pipe.jsonl", "folder.jsonl", "link.jsonl", "step-3/report.json"):
        assert f"{name}: not a regular file" in said
    assert [record["step"] for record in read_run(strange).records] == [50]


def test_a_part_of_a_report_names_the_folder_of_the_run(tmp_path: Path) -> None:
    """Catches an empty page inside a report."""
    alarm(tmp_path, "b")
    (place,) = tmp_path.rglob("report.json")
    for path in (place, place.parent, place.with_suffix(".md")):
        path.touch()
        with pytest.raises(ValueError, match=f"pass the folder of the run, {place.parent.parent}"):
            read_run(path)


@pytest.mark.parametrize("end", range(0, 400, 37))
def test_any_beginning_of_a_file_is_readable(tmp_path: Path, end: int) -> None:
    """Catches a page that a kill at the wrong moment prevents."""
    path = write(tmp_path, margins(50), margins(100))
    path.write_bytes(path.read_bytes()[:end])
    assert len(read_run(tmp_path).records) <= 2


def test_a_resumed_run_counts_once(tmp_path: Path) -> None:
    """Catches steps that go back and forth in the charts."""
    write(tmp_path, margins(50), margins(100, 2.0), margins(150, 2.0), margins(100), margins(150))
    run = read_run(tmp_path)
    assert [record["sharpness_ratio"] for record in run.records] == [0.5, 0.5, 0.5]
    assert run.superseded == 2


def test_decisions_of_a_run_that_went_back_count_once(tmp_path: Path) -> None:
    """Catches a decision that is listed twice, or that was never carried out in the run that remains;
    and one that is lost because an alarm measures its step after it.
    """
    sink = JSONLinesSink(tmp_path / "margins.jsonl")
    from_the_checkpoint_at_20 = (30, 40)
    for resumed, steps in ((False, (10, 20, 30, 40)), (True, from_the_checkpoint_at_20)):
        for step in steps:
            sink(step, margins(step).record())
            sink.note(step, f"{resumed}")
    expected = [(10, "False"), (20, "False"), (30, "True"), (40, "True")]
    run = read_run(tmp_path)
    assert run.decisions == expected
    assert [record["step"] for record in run.records] == [10, 20, 30, 40]
    assert run.superseded == 4
    sink.note(45, "at the alarm")
    sink(45, margins(45).record())
    assert read_run(tmp_path).decisions == [*expected, (45, "at the alarm")]
    sink.note(25, "before a measurement")
    run = read_run(tmp_path)
    assert run.decisions == [*expected[:2], (25, "before a measurement")]
    assert [record["step"] for record in run.records] == [10, 20]


def test_alarms_of_a_run_that_was_replaced_are_superseded(tmp_path: Path) -> None:
    """Catches the spike of a run that was repaired and run again into the same folder, an alarm that a
    resumed run repeats, and one that is lost with lines that are missing.
    """
    losses = {2: 1.0, 3: 1.0, 4: 1.0}
    with mock.patch("importlib.util.find_spec", return_value=None):  # figures take most of the time
        alarm(tmp_path)  # measured at 2 and at 4, with a loss of 1
        sink = JSONLinesSink(tmp_path / "margins.jsonl")

        def ran(steps: dict[int, float]) -> Run:
            for step, loss in steps.items():
                sink(step, {"loss": loss, "failed": 0.0, "converged": 1.0})
            return read_run(tmp_path)

        assert len(ran({2: 1.0, 3: 1.0}).reports) == 1  # the line of step 4 is missing
        assert len(ran({4: 1.0}).reports) == 1
        assert len(ran(losses).reports) == 1  # the same again
        alarm(tmp_path)
        run = read_run(tmp_path)
        assert len(run.reports) == 1
        assert run.superseded == 3 + 1
        assert len(ran(losses | {4: 0.9}).reports) == 0
        run = ran({2: 1.0, 3: 1.0})  # it has not come to the alarm's measurement
        assert (len(run.reports), run.superseded) == (0, 9 + 2)


def test_wrong_folders_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a page of the wrong run, and a message without the way out."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"expected a file \*\.jsonl"):
        read_run(tmp_path)
    write(tmp_path / "a", margins(50))
    write(tmp_path / "b", margins(60))
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"a/margins.jsonl, b/margins.jsonl; pass one"):
        read_run(tmp_path)
    assert len(read_run(tmp_path / "b" / "margins.jsonl").records) == 1
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "pass one" in capsys.readouterr().err


def test_the_command_writes_only_the_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches other files than the page, and an old page that a failure destroys."""
    write(tmp_path / "run", margins(50))
    out = tmp_path / "elsewhere.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "elsewhere.html",
        "margins.jsonl",
    ]
    with pytest.raises(FileNotFoundError, match=r"none.x\.html: its folder does not exist"):
        write_page(tmp_path / "run", tmp_path / "none" / "x.html")
    before = out.read_text()
    with mock.patch("os.replace", side_effect=OSError("disk full")), pytest.raises(SystemExit):
        main(["report", str(tmp_path / "run"), "--out", str(out)])
    assert out.read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    """Catches a bare ModuleNotFoundError."""
    write(tmp_path, margins(50))
    named = partial(pytest.raises, ImportError, match=r"pip install stableopt\[report\]")
    with mock.patch("importlib.util.find_spec", return_value=None):
        with named():
            write_page(tmp_path)
        assert "pip install stableopt[report]" in notebook(read_run(tmp_path))
    writer._template.cache_clear()
    with mock.patch.dict(sys.modules, {"jinja2": None}), named():
        write_page(tmp_path)


def test_ten_thousand_measurements_are_a_small_page() -> None:
    """Catches a page that grows with the run: the bar is 2 MB."""
    records = [
        {"step": k, "sharpness": math.sin(k), "sharpness_ratio": math.sin(k), "failed": 0.0}
        for k in range(10_000)
    ]
    assert len(page(Run("long", records))) < 300_000


def test_the_heat_map_has_the_shares_of_records_and_reports(tmp_path: Path) -> None:
    """Catches a map of reports alone, a layer that only began later, and rubbish in a record."""
    path = write(tmp_path)
    path.parent.mkdir(exist_ok=True)
    known = {"failed": 0, "converged": 1}
    by_layer = {"a": {"share": 0.25}, "b": {"share": 0.75}, "c": None, "d": {"share": None}}
    lines = [{"step": 4, **known, "by_layer": by_layer}, {"step": 6, **known, "by_layer": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alarm(tmp_path, "b")
    run = read_run(tmp_path)
    assert run.shares == {2: {"b": 0.9, "0": 0.1}, 4: {"a": 0.25, "b": 0.75}}
    found = heat_map(run)
    assert found is not None
    assert found.rows[0] == ("b", 0.75, [(0, 0.9), (1, 0.75)])
    assert [row[0] for row in found.rows] == ["b", "a", "0"]


def test_thinning_keeps_extremes_and_gaps() -> None:
    """Catches a spike of one measurement that is not drawn."""
    points = [(float(k), 0.0) for k in range(5000)]
    points[1234], points[4000] = (1234.0, 9.0), (4000.0, -9.0)
    points[2000:3000] = [(float(k), math.nan) for k in range(2000, 3000)]
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert {(1234.0, 9.0), (4000.0, -9.0)} <= set(kept)
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_rows_and_sentences() -> None:
    """Catches an infinite limit shown as a ratio, and a sentence that hides a failure."""
    last = {"step": 9, "failed": 0.0, "sharpness": 3.0, "sharpness_ratio": 1.5, "own_ratio": None}
    last |= {"non_uniformity": 1.0, "non_uniformity_limit": None, "non_uniformity_ratio": 0.0}
    run = Run("x", [last, {"step": 10, "failed": 1.0}])
    sharp, free, own = rows(run)
    assert (sharp.level, sharp.share, sharp.ratio) == ("over", 0.75, "1.5")
    assert (free.limit, free.ratio, free.level) == ("none", "–", "")
    assert own.ratio == "–"
    assert sentence(run) == (
        "Step 9 is beyond the edge of stability: the sharpness is 1.5 times its limit; the last"
        " measurement failed."
    )
    assert sentence(Run("x", [{"step": 1, "failed": 1.0}])) == "Every measurement failed."
    assert heat_map(run) is None


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ((0.9, 120.0, 2e6), r"1e-?\d"),
        ((2e-4, 0.3), r"1e-?\d"),
        ((0.9, 120.0), r"[\d.]+"),
        ((8000.0, 12000.0), r"0|\d{1,2},000"),
        ((8e6, 1.2e7), r"0|[\d.]+e\d"),
        ((4e-4, 1.2e-3), r"0|[\d.]+e-\d"),
    ],
)
def test_the_labels_of_an_axis_have_one_format(losses: Sequence[float], labels: str) -> None:
    """Catches 100, 1e+04 and 1e6 at one axis."""
    records = [{"step": k, "failed": 0.0, "loss": loss} for k, loss in enumerate(losses)]
    (chart,) = charts(Run("x", records))
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", chart.svg)
    numbers = [text for text in texts[texts.index("step") + 1 :] if text != "probe set"]
    assert len(numbers) > 1
    assert all(re.fullmatch(labels, text) for text in numbers), numbers
    assert max(map(len, numbers)) <= 7


def test_figures_ignore_the_settings_of_the_user() -> None:
    """Catches a chart that needs LaTeX, and settings that stay changed."""
    run = Run("x", [{"step": 9, "failed": 0.0, "sharpness_ratio": 1.5}])
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red"}):
        (chart,) = charts(run)
        assert matplotlib.rcParams["text.usetex"]
    assert "#ff0000" not in chart.svg
    assert chart.svg == charts(run)[0].svg


def test_the_norm_before_clipping_is_drawn() -> None:
    """Catches an odd batch whose clipped gradient looks like all others."""

    def drawn(norms: Sequence[float | None]) -> str:
        steps = [
            {"step": k, "grad_norms": {"0": 1.0}, "total_norm": norm}
            for k, norm in enumerate(norms)
        ]
        report = FlightReport(9, "the loss rose", "batch", "", "", steps, [])
        return next(c.svg for c in charts_of_report(report) if "norm" in c.title)

    calm = [1.0] * 9
    assert drawn(calm) == drawn([None] * 9)
    assert drawn([*calm[:5], 50.0, *calm[6:]]) != drawn(calm)


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_no_special_file_is_replaced(tmp_path: Path, kind: str) -> None:
    """Catches a device or a link that becomes a regular file, as /dev/null would."""
    write(tmp_path, margins(1))
    out = tmp_path / "out"
    if kind == "fifo":
        os.mkfifo(out)
        with pytest.raises(ValueError, match="expected a file or a folder, and it is neither"):
            write_page(tmp_path, out)
        assert out.is_fifo()
    else:
        (tmp_path / "page.html").touch()
        out.symlink_to(tmp_path / "page.html")
        write_page(tmp_path, out)
        assert out.is_symlink()
        assert "<html" in (tmp_path / "page.html").read_text()


def test_a_notebook_shows_the_monitor() -> None:
    """Catches an error in a notebook's cell: before a measurement, after failures, with rubbish."""
    model, x, y = nn.Linear(2, 1), torch.ones(4, 2), torch.zeros(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with StabilityMonitor(optimizer, model, nn.MSELoss(), (x, y), every=1) as monitor:
        assert "Nothing has been measured yet." in monitor._repr_html_()
        nn.MSELoss()(model(x), y).backward()
        optimizer.step()
        assert "is inside the region of stability" in monitor._repr_html_()
        assert "<html" not in monitor._repr_html_()
        assert "Layers in the top eigenvector" in monitor._repr_html_()
        monitor.history.append(StabilityMargins(step=2, failure=HOSTILE))
        assert "the last measurement failed" in monitor._repr_html_()
        monitor.history.append(None)  # type: ignore[arg-type]
        assert monitor._repr_html_() is None
