"""The command line: what it runs, prints and writes, and its errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import run_in_this_process

from benchmarks import agenda, cli, experiments, report, sweep_runner
from benchmarks.experiments import gd_sharpness
from benchmarks.framework.publish import publish
from benchmarks.framework.tables import read_table, records
from benchmarks.runner import Job, Place, Store
from benchmarks.runner import execute as work
from benchmarks.runner.schedule import Summary
from benchmarks.sweeps import remember, remembered
from benchmarks.training.minimum import Solution

RUN = ("run", "gd-sharpness", "--preset", "smoke", "--set", "n=60", "--set", "target_loss=0.06")
CLAIM = {"tolerance": "", "why": "", "theory": ""}
ABOUT = {
    "device": ["cpu"],
    "torch": ["2"],
    "jobs": 1,
    "done": 1,
    "failed": 0,
    "seconds": 1.0,
    "settings": {"seeds": [0]},
}
SETTINGS = {"n": 60, "target_loss": 0.06, "lrs": (0.5, 500.0)}


@pytest.fixture(autouse=True)
def only_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run jobs where the tests can see them, and quickly."""
    run_in_this_process(monkeypatch)


@pytest.fixture(autouse=True)
def few_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one experiment; each has its own tests."""
    for module in (experiments, agenda, cli, report):
        monkeypatch.setattr(module, "NAMES", ("gd-sharpness",))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of two rates; one diverges."""
    out = tmp_path_factory.mktemp("ran")
    assert cli.main([*RUN, "--set", "lrs=0.5,500", "--out", str(out)]) == 0
    return out


def main(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line, check that it succeeds, and return what it printed."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_run_writes_what_it_found_and_does_nothing_twice(
    ran: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches tables that differ from the jobs' results, and a second run that trains again."""
    folder = ran / "smoke" / "digits" / "gd-sharpness"
    names = {"sharpness.csv", "sharpness.png", "sharpness.svg", "claims.json", "about.json"}
    assert {path.name for path in folder.iterdir()} == names
    store, sweep = Store(ran), gd_sharpness.EXPERIMENT(**SETTINGS)
    rows = records(read_table(folder / "sharpness.csv"))
    assert [row["lr"] for row in rows] == [0.5, 500.0]
    assert [row["outcome"] for row in rows] == ["reached", "diverged"]
    for job, row in zip(sweep.jobs(), rows, strict=True):
        assert row["sharpness"] == store.result(job).sharpness
    about = json.loads((folder / "about.json").read_text())
    assert (about["jobs"], about["done"], about["failed"]) == (2, 2, 0)
    monkeypatch.setattr(Solution, "run", lambda self, work: pytest.fail("trains"))
    output = main(capsys, *RUN, "--set", "lrs=0.5,500", "--out", ran)
    assert "2 jobs, 0 to do" in output
    assert output.startswith("a: sharpness, λmax of the Hessian · s: non-uniformity")


def test_a_dry_run_says_what_is_left_and_leaves_nothing(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that writes files, trains, or lists finished jobs."""
    output = main(capsys, *RUN, "--set", "lrs=0.5,0.25", "--dry-run", "--out", ran)
    assert "2 jobs, 1 to do" in output
    ids = re.findall(r"solution-[0-9a-f]{12}", output)
    left = gd_sharpness.EXPERIMENT(**{**SETTINGS, "lrs": (0.25,)}).jobs()
    assert ids == [job.id for job in left]
    new = tmp_path / "new"
    main(capsys, *RUN, "--dry-run", "--out", new)
    assert not new.exists()


def test_paper_runs_what_is_missing_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an exceeded time budget, finished experiments that run again, and a missing summary."""
    monkeypatch.setattr(gd_sharpness.EXPERIMENT, "presets", {("smoke", "digits"): SETTINGS})
    monkeypatch.setattr(gd_sharpness.EXPERIMENT, "datasets", ("digits",))
    call = ("paper", "--preset", "smoke", "--out", tmp_path, "--results", tmp_path / "published")
    output = main(capsys, *call, "--time-budget", "0s")
    assert output.count("Missing of the smoke preset") == 2
    assert "2 jobs" not in output
    output = main(capsys, *call, "--time-budget", "5m")
    assert "2 jobs, 2 to do" in output
    assert "Nothing of the smoke preset is missing" in output
    assert "Missing" not in main(capsys, *call, "--dry-run")


def test_shards_share_the_jobs_and_seeds_multiply_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches overlapping shards, and ``--seeds`` that does not reach the experiment."""
    ids = []
    for shard in ("1/2", "2/2"):
        output = main(
            capsys, *RUN, "--seeds", "0,1,2", "--shard", shard, "--dry-run", "--out", tmp_path
        )
        ids += re.findall(r"solution-[0-9a-f]{12}", output)
    sweep = gd_sharpness.EXPERIMENT.preset("smoke", seeds=(0, 1, 2), n=60, target_loss=0.06)
    assert sorted(ids) == sorted(job.id for job in sweep.jobs())
    assert len(ids) == 9


def test_a_failure_is_said_counted_and_run_again_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an exit code of 0 for a sweep with failures, and a table that counts them as done."""

    def fail(self: Job, work: Any) -> Any:
        raise ArithmeticError("no [such] luck")

    arguments = [*RUN, "--set", "lrs=0.5", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Solution, "run", fail)
        assert cli.main(arguments) == 1
    output = capsys.readouterr().out
    assert "ArithmeticError: no [such] luck" in output
    assert "--retry" in output
    assert cli.main(arguments) == 1
    capsys.readouterr()
    output = main(capsys, "status", "--out", tmp_path)
    cells = [cell.strip() for line in output.splitlines() for cell in re.split("[│|]", line)]
    start = cells.index("gd-sharpness")
    assert cells[start : start + 8] == ["gd-sharpness", "smoke", "digits", "1", "0", "0", "1", "0"]
    assert "ArithmeticError: no [such] luck" in output
    main(capsys, *arguments, "--retry")
    assert "ArithmeticError" not in main(capsys, "status", "--out", tmp_path)


@pytest.mark.parametrize(("threads", "workers", "each"), [(8, 1, 8), (8, 3, 2), (1, 2, 1)])
def test_workers_share_the_threads(
    threads: int, workers: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches workers that use more threads in total than there are cores or the environment allows.

    They would wait for each other most of the time.
    """
    places = []

    def look(jobs: Any, store: Any, place: Place, **options: Any) -> Summary:
        places.append(place)
        return Summary()

    monkeypatch.setattr(sweep_runner, "run_all", look)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert cli.main([*RUN, "-j", str(workers), "--out", str(tmp_path)]) == 0
    assert [place.threads for place in places] == [each]


def test_figures_are_drawn_from_what_there_is_and_come_out_the_same(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a figure with a date or a random id in it, and `figures` that trains or measures."""
    for module, name in ((work, "work"), (Solution, "run")):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("it trains"))
    monkeypatch.setattr("stableopt.measure", lambda *a, **k: pytest.fail("it measures"))
    main(capsys, "figures", "--out", ran, "--into", tmp_path / "a")
    main(capsys, "figures", "gd-sharpness", "--out", ran, "--into", tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in files:
        if file.suffix in (".png", ".svg") or file.name == "claims.json":
            (tmp_path / "a" / file).unlink()
    main(capsys, "redraw", "gd-sharpness", "--results", tmp_path / "a")
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("broken", ["", '{"experiment": "renamed"}', "a removed setting"])
def test_a_sweep_that_cannot_be_read_is_named_and_skipped(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    """Catches one file of an older version that hides all other sweeps."""
    shutil.copytree(ran, tmp_path / "runs")
    (sweep,) = (tmp_path / "runs" / "sweeps").glob("*.json")
    saved = json.loads(sweep.read_text())
    saved["settings"]["gone"] = 3
    text = json.dumps(saved) if broken == "a removed setting" else broken
    (sweep.parent / "broken.json").write_text(text)
    assert cli.main(["status", "--out", str(tmp_path / "runs")]) == 0
    out, err = capsys.readouterr()
    assert "gd-sharpness" in out
    assert "broken.json" in err.replace("\n", "")


def test_the_report_holds_every_claim(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a missing claim, a refuted one shown as reproduced, and a preset not listed as missing."""
    folder = tmp_path / "small" / "digits" / "gd-sharpness"
    folder.mkdir(parents=True)
    for path in (ran / "smoke" / "digits" / "gd-sharpness").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    main(capsys, "report", "--results", tmp_path, "--to", tmp_path / "R.md")
    text = (tmp_path / "R.md").read_text()
    claims = json.loads((folder / "claims.json").read_text())
    assert claims
    for claim in claims:
        line = next(line for line in text.splitlines() if claim["what"] in line)
        assert claim["ours"] in line
        assert ("**no**" in line) == (not claim["reproduced"])
    assert "paper, fashion-mnist" in next(x for x in text.splitlines() if "not run |" in x)


def test_the_report_opens_with_what_is_printed_on_the_papers_data(tmp_path: Path) -> None:
    """Catches results on digits, claims of theory, or a smaller preset among the paper's numbers.

    A larger preset without claims, such as one of three runs, replaces no smaller one.
    """
    texts = {
        "small/digits": "digits",
        "small/fashion-mnist": "few",
        "paper/fashion-mnist": "many | all",
        "small/cifar10-2": "airplanes",
    }
    for place, ours in texts.items():
        folder = tmp_path / place / "gd-sharpness"
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps(ABOUT))
        claims = [("sharpness", "19.6", True), ("below 2/η", "", True), ("as seen", "rises", False)]
        content = [
            {**CLAIM, "what": what, "printed": printed, "reproduced": held, "ours": ours}
            for what, printed, held in claims
        ]
        (folder / "claims.json").write_text(json.dumps(content))
    silent = tmp_path / "paper" / "cifar10-2" / "gd-sharpness"
    silent.mkdir(parents=True)
    (silent / "about.json").write_text(json.dumps(ABOUT))
    (silent / "claims.json").write_text("[]")
    opening = report.report(tmp_path, "results").partition("All experiments")[0]
    lines = [line for line in opening.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        r"| [Table 2](#gd-sharpness), fashion-mnist | sharpness | 19.6 | many \| all | yes |",
        r"|  | as seen | rises | many \| all | **no** |",
        "| [Table 2](#gd-sharpness), cifar10-2 | sharpness | 19.6 | airplanes | yes |",
        "|  | as seen | rises | airplanes | **no** |",
    ]


def test_list_names_experiments_and_timings(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a name without a description."""
    output = main(capsys, "list")
    assert re.search(r"gd-sharpness +The sharpness of gradient descent's minima", output)
    assert re.search(r"perf lbfgs +\w+", output)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "gd-sharpness", "--set", "speed=3"], "speed=3: expected one of data, seeds"),
        (["run", "gd-sharpness", "--set", "n=many"], "n=many: expected int"),
        (["run", "gd-sharpness", "--set", "lrs"], "--set lrs: expected KEY=VALUE"),
        (["run", "gd-sharpness", "--seeds", "a"], "seeds=a: expected tuple"),
        (["run", "gd-sharpness", "--data", "mnist"], "--data mnist, expected digits or"),
        (["run", "gd-sharpness", "--shard", "2"], "--shard 2: expected I/N"),
        (["run", "gd-sharpness", "--shard", "3/2"], "shard 3/2: expected from 1/2 to 2/2"),
        (["run", "gd-sharpness", "-j", "0"], "workers=0: expected at least 1"),
        (["run", "gd-sharpness", "--executor", "threads"], "executor='threads': expected"),
        (["run", "sharpness"], "'sharpness': expected one of"),
        (["run", "gd-sharpness", "--preset", "huge"], "invalid choice 'huge'"),
        (["run"], "expected NAME"),
        ([], "Missing subcommand"),
        (["figures"], "nothing was run in"),
        (["redraw", "--results", "nowhere"], "nothing was published in nowhere"),
        (["figures", "sharpness"], "nothing was run in"),
        (["report", "--results", "nowhere"], "nowhere is empty"),
        (["paper", "--time-budget", "3 days"], "'3 days': expected a number of"),
        (["perf", "speed"], "speed: expected some of products"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback, or an exit code of 0, for a typing error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:  # by tyro, or by the code returned
        sys.exit(cli.main(arguments))
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_experiment_of_which_nothing_is_done_publishes_no_table(tmp_path: Path) -> None:
    """Catches an error, or a table without rows, while the first jobs are still running."""
    sweep = gd_sharpness.EXPERIMENT(**SETTINGS)
    files = publish(sweep, "smoke", Store(tmp_path), tmp_path)
    assert {path.name for path in files} == {"claims.json", "about.json"}
    assert json.loads(files[0].read_text()) == []
    assert json.loads(files[1].read_text())["done"] == 0


def test_a_sweep_says_if_it_replaces_other_settings(tmp_path: Path) -> None:
    """Catches a silent replacement, and a broken file of an earlier sweep that ends the run."""
    store, kind = Store(tmp_path), experiments.experiment("gd-sharpness")
    first, second = (replace(kind.preset("smoke", None), seeds=seeds) for seeds in ((0,), (1,)))
    said = [remember(each, "smoke", store) for each in (first, first, second)]
    assert said == [False, False, True]
    (path,) = (tmp_path / "sweeps").iterdir()
    path.write_text('{"settings": ')
    assert remember(first, "smoke", store) is False
    assert [sweep for _, sweep in remembered(tmp_path, lambda *_: None)] == [first]
