"""The finished jobs of unfinished experiments, which anyone can continue."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from benchmarks.experiments import experiment
from benchmarks.runner import Store, in_order

ARCHIVES = sorted((Path(__file__).parents[3] / "benchmarks" / "unfinished").glob("*.tar.xz"))


@pytest.mark.parametrize("archive", ARCHIVES, ids=[path.name for path in ARCHIVES])
def test_the_jobs_are_those_of_the_experiment(archive: Path, tmp_path: Path) -> None:
    """Catches an archive of another version's jobs, which a run would not find, or of broken ones."""
    preset, data, name = archive.name.removesuffix(".tar.xz").split("-", 2)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    store = Store(tmp_path)
    jobs = {job.id: job for job in in_order(experiment(name).preset(preset, data).jobs())}
    found = {folder.name for folder in store.jobs.iterdir()}
    assert found <= jobs.keys()
    assert len(found) < len(jobs)  # else publish it
    for name in found:
        store.result(jobs[name])
        assert store.about(jobs[name])["seconds"] > 0
    # A job's needs are there too, with the weights that it starts from.
    needed = {need.id for name in found for need in jobs[name].needs}
    assert needed <= found
    weights = {job.id for job in jobs.values() if job.kind == "solution"}
    assert all((store.jobs / name / "tensors.pt").exists() for name in found & weights)
