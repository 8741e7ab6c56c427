"""Jobs that end by themselves, by an error or by a signal, and jobs that others run meanwhile."""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import Timeout
from runner_jobs import Failing, Member, Number, Unwritable, Walk

from benchmarks.runner import Job, Place, Store, Work, context
from benchmarks.runner.execute import work
from benchmarks.runner.files import read_lines

HERE = Place()
KEPT = ("result.json", "trace.jsonl", "tensors.pt")


class KilledError(BaseException):
    """No ``Exception``: passes through everything, as the end of the process does."""


def kill_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Raise, as the end of the process would, at the n-th note of progress."""
    count = iter(range(1, 10**6))

    def progress(self: Work, share: float, text: str = "") -> None:
        if next(count) == call:
            raise KilledError

    monkeypatch.setattr(Work, "progress", progress)


def files(store: Store, job: Job) -> dict[str, bytes]:
    return {name: (store.folder(job) / name).read_bytes() for name in KEPT}


def test_what_a_finished_job_leaves(tmp_path: Path) -> None:
    """Catches a file that is missing, and one that only the running job needed."""
    store, job = Store(tmp_path), Walk(0)
    times = work([job], tmp_path, HERE)
    assert {path.name for path in store.folder(job).iterdir()} == {*KEPT, "job.json"}
    assert store.result(job)["inf"] is None
    assert [record["step"] for record in store.trace(job)] == list(range(1, 96))
    assert store.tensors(job)["x"].tolist() == store.result(job)["value"]
    about = store.about(job)
    assert about["seconds"] == times[job.id] > 0
    assert (about["kind"], about["config"], about["ensemble"]) == ("walk", job.config, 1)
    assert about["torch"] == str(torch.__version__)


@pytest.mark.parametrize("at", [1, 9, 10, 11, 57, 95])
def test_a_walk_that_was_killed_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Catches a trace with lines twice, or missing, after a resume; also where no checkpoint was."""
    job = Walk(1)
    work([job], tmp_path / "whole", HERE)
    store = Store(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(patch, at)
        with pytest.raises(KilledError):
            work([job], store.root, HERE)
    assert not store.done(job)
    assert len(read_lines(store.part(job) / "trace.jsonl")) == at
    # A line cut short, and files that were to be renamed, as kill -9 can leave them.
    with (store.part(job) / "trace.jsonl").open("a") as file:
        file.write('{"step": 58, "a')
    for name in ("checkpoint.partial", "result.json.17.partial", "progress.json.17.partial"):
        (store.part(job) / name).write_text("{")
    work([job], store.root, HERE)
    assert files(store, job) == files(Store(tmp_path / "whole"), job)
    assert {path.name for path in store.folder(job).iterdir()} == {*KEPT, "job.json"}


def test_an_error_is_recorded_and_does_not_count_as_done(tmp_path: Path) -> None:
    """Catches a lost error or traceback, and a result that cannot be written but counts as done.

    Also catches a second run that tries a failed job again without being asked.
    """
    store, cure = Store(tmp_path), tmp_path / "cure"
    failing, unwritable = Failing(str(cure)), Unwritable()
    assert work([failing], tmp_path, HERE) == {failing.id: None}
    work([unwritable], tmp_path, HERE)
    for job, says in ((failing, "ArithmeticError: no cure"), (unwritable, "TypeError: Object of")):
        assert not store.done(job)
        failure = store.failure(job)
        assert failure is not None
        assert failure["error"].startswith(says)
        assert "runner_jobs.py" in failure["details"] or job is unwritable
    cure.touch()
    work([failing], tmp_path, HERE)
    assert not store.done(failing)
    store.clear_failure(failing)
    work([failing], tmp_path, HERE)
    assert store.done(failing)


def test_an_error_ends_its_checkpoint_and_a_death_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a retry that resumes from the state that failed, and a resume that loses hours of work."""
    store, job = Store(tmp_path), Walk(2)
    with monkeypatch.context() as patch:
        kill_at(patch, 30)
        with pytest.raises(KilledError):
            work([job], tmp_path, HERE)
    assert store.has_checkpoint(job)
    store.fail(job, "WorkerDied")
    store.clear_failure(job)
    assert store.has_checkpoint(job)
    with monkeypatch.context() as patch:
        patch.setattr(Work, "save", lambda self, tensors: 1 / 0)
        work([job], tmp_path, HERE)
    assert store.failure(job) is not None
    assert not store.has_checkpoint(job)


def test_a_checkpoint_without_a_trace(tmp_path: Path) -> None:
    """Catches a resume that asks for a trace where none was written."""
    store, job = Store(tmp_path), Number(1.0)
    store.part(job).mkdir(parents=True)
    work = Work(job, store, HERE)
    work.checkpoint({"step": 3})
    assert work.restored() == {"step": 3}
    assert work.restored() == {"step": 3}


def test_seconds_of_work_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a resumed job that forgets its first hours, and one that counts those of a pause."""
    store, job, now = Store(tmp_path), Number(1.0), {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(context, "_clocks", lambda: tuple(now.values()))
    store.part(job).mkdir(parents=True)
    first = Work(job, store, HERE)
    now.update(wall=30.0, cpu=10.0)  # paused for 20 seconds
    first.checkpoint({"step": 3})
    now.update(wall=40.0, cpu=20.0)  # lost with the process
    resumed = Work(job, store, HERE)
    resumed.restored()
    now.update(wall=45.0, cpu=27.0)  # two threads
    assert first.seconds == 27.0
    assert resumed.seconds == 10.0 + 5.0


def hold(root: Path, job: Job, ready: Any, go: Any) -> None:
    with Store(root).lock(job):
        ready.set()
        go.wait(30)


def test_two_processes_do_not_run_the_same_job(tmp_path: Path) -> None:
    """Catches a lock that other processes ignore, or that outlives a killed process."""
    store, job = Store(tmp_path), Number(1.0)
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, job, ready, go))
    other.start()
    assert ready.wait(30)
    with pytest.raises(Timeout):
        store.lock(job).acquire(timeout=0)
    waiting = threading.Thread(target=work, args=([job], tmp_path, HERE))
    waiting.start()
    waiting.join(0.1)
    assert not store.part(job).exists()
    other.kill()
    other.join()
    waiting.join(30)
    assert store.done(job)


def test_a_job_that_another_process_has_done_is_not_done_again(tmp_path: Path) -> None:
    """Catches repeated work, and a failure because the folder exists already."""
    store, job = Store(tmp_path), Number(1.0)
    work([job], tmp_path, HERE)
    before = store.about(job)
    assert work([job], tmp_path, HERE) == {job.id: None}
    assert store.about(job) == before


def test_ensembles_share_the_time_and_lock_in_one_order(tmp_path: Path) -> None:
    """Catches time that is counted for each member in full, a member done already that is done
    again, and two processes that deadlock.
    """
    members = [Member(x) for x in range(4)]
    work([members[0]], tmp_path, HERE)
    threads = [
        threading.Thread(target=work, args=(order, tmp_path, HERE))
        for order in (members, members[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    store = Store(tmp_path)
    assert store.result(members[0])["with"] == [0]
    assert sorted(store.result(members[1])["with"]) == [1, 2, 3]
    abouts = [store.about(job) for job in members[1:]]
    assert {about["ensemble"] for about in abouts} == {3}
    assert len({about["seconds"] for about in abouts}) == 1
