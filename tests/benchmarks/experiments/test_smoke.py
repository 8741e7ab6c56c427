"""Every experiment, from the command line to its figures, in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import run_in_this_process

from benchmarks import cli
from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.publish import publish
from benchmarks.framework.tables import read_table
from benchmarks.runner import Store


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches stages that do not fit together, an empty table, and a figure of another table."""
    run_in_this_process(monkeypatch)
    assert cli.main(["run", name, "--preset", "smoke", "--out", str(tmp_path)]) == 0
    kind = experiment(name)
    folder = tmp_path / "smoke" / kind.datasets[0] / name
    about = json.loads((folder / "about.json").read_text())
    assert about["done"] == about["jobs"] > 0
    tables = {path.stem: read_table(path) for path in folder.glob("*.csv")}
    assert tables
    assert all(map(len, tables.values()))
    smoke = kind.preset("smoke")
    for table, rows in tables.items():
        drawn = smoke.draw(table, rows)
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            picture = folder / f"{table}{suffix}"
            assert picture.exists() == (drawn is not None)
            if drawn is not None:
                assert picture.read_bytes().startswith(magic)
    for claim in json.loads((folder / "claims.json").read_text()):
        assert isinstance(claim["reproduced"], bool)
        assert claim["what"]
        assert claim["ours"]
    # Published again, from the same results, it is the same.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    publish(smoke, "smoke", Store(tmp_path), tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_presets_ask_for_jobs(name: str, preset: str) -> None:
    """Catches a preset with a setting that the experiment does not have, and identical jobs."""
    kind = experiment(name)
    for data in kind.datasets:
        configured = kind.preset(preset, data)
        jobs = configured.jobs()
        assert jobs
        assert len({job.id for job in jobs}) == len(jobs)
        # Two tables may show a job, but each shows it once.
        for cases in configured.cases().values():
            assert len({case.job.id for case in cases}) == len(cases)
    with pytest.raises(ValueError, match="expected"):
        kind.preset(preset, "mnist")
