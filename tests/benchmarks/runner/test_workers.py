"""Sweeps on real processes: pools, Dask, submitit, and after ``kill -9``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runner_jobs import WALKS, Dying, Failing, Number, Sum

from benchmarks.runner import Job, Place, Store, run_all
from benchmarks.runner.workers import executor

ROOT = Path(__file__).parents[3]
HERE = Place(threads=1)
KEPT = ("result.json", "trace.jsonl", "tensors.pt")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let processes that are begun in a test import its jobs."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "helpers")))
    monkeypatch.setenv("PYTHONPATH", path)
    return path


def until(true: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def alive(group: int) -> list[int]:
    """Return the processes of a group that run."""
    listed = subprocess.run(
        ["ps", "-axo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and state[0] != "Z"]


def files(store: Store, jobs: list[Job]) -> dict[str, bytes]:
    """Return the bytes of all results."""
    return {
        f"{job.id}/{name}": (store.folder(job) / name).read_bytes() for job in jobs for name in KEPT
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = Store(tmp_path_factory.mktemp("undisturbed"))
    run_all(list(WALKS), store, HERE)
    return files(store, list(WALKS))


@pytest.fixture
def begin(tmp_path: Path, importable: str) -> Iterator[Callable[[int], subprocess.Popen[bytes]]]:
    """Return what begins a sweep in a process group of its own, which ends with the test."""
    if os.name != "posix":
        pytest.skip("kill -9 and process groups are POSIX's")
    begun: list[subprocess.Popen[bytes]] = []

    def begin(workers: int) -> subprocess.Popen[bytes]:
        call = f"from runner_jobs import sweep; sweep({str(tmp_path)!r}, {workers})"
        environment = {**os.environ, "PACE": "0.05"}
        begun.append(
            subprocess.Popen([sys.executable, "-c", call], env=environment, start_new_session=True)
        )
        return begun[-1]

    yield begin
    for process in begun:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("target", "workers"), [("the parent", 2), ("the group", 1)])
def test_a_sweep_that_was_killed_is_finished_as_if_it_had_not_been(
    tmp_path: Path,
    begin: Callable[[int], subprocess.Popen[bytes]],
    undisturbed: dict[str, bytes],
    target: str,
    workers: int,
) -> None:
    """Catches a rerun that counts half a job as done, that goes on from another state than the
    trace's, or that waits for a lock forever; and workers that outlive their parent.
    """
    store = Store(tmp_path)
    process = begin(workers)
    until(lambda: process.poll() is not None or sum(map(store.has_checkpoint, WALKS)) == workers)
    assert len(alive(process.pid)) > workers
    if target == "the group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    until(lambda: not alive(process.pid))
    begun = [job for job in WALKS if store.has_checkpoint(job)]
    assert begun
    assert not [job for job in WALKS if store.failure(job)]
    summary = run_all(list(WALKS), store, HERE)
    assert set(summary.done) >= set(begun)
    assert (summary.failed, summary.blocked) == ([], [])
    assert files(store, list(WALKS)) == undisturbed


def test_a_sweep_whose_time_is_up_stops_its_processes_and_continues_later(
    tmp_path: Path, importable: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a budget that waits for the jobs in progress, and one that counts them as failed."""
    monkeypatch.setenv("PACE", "10")
    store, jobs = Store(tmp_path), list(WALKS)
    summary = run_all(jobs, store, HERE, make_executor=executor("processes", 1), seconds=2)
    assert summary.left == jobs
    assert (summary.done, summary.failed, summary.blocked) == ([], [], [])
    monkeypatch.setenv("PACE", "0")
    assert run_all(jobs, store, HERE).left == []
    assert files(store, jobs) == undisturbed


def test_workers_that_are_still_starting_end_with_their_parent(
    tmp_path: Path, begin: Callable[[int], subprocess.Popen[bytes]]
) -> None:
    """Catches workers that start after their parent has gone, and wait forever."""
    process = begin(1)
    # The parent, the worker, and Python's resource tracker.
    until(lambda: len(alive(process.pid)) >= 3)
    assert not list((tmp_path / "jobs").glob("*.part"))
    process.kill()
    process.wait()
    until(lambda: not alive(process.pid))


def test_a_worker_that_dies_costs_its_job_only(tmp_path: Path, importable: str) -> None:
    """Catches a dead worker that ends the sweep, loses other jobs, or is not recorded."""
    store = Store(tmp_path)
    numbers = [Number(float(x)) for x in range(4)]
    dying = Dying("kill")
    jobs: list[Job] = [numbers[0], dying, *numbers[1:], Sum((dying,))]
    summary = run_all(jobs, store, HERE, make_executor=executor("processes", 2), in_flight=2)
    assert summary.failed == [dying]
    assert set(summary.done) == set(numbers)
    assert summary.blocked == [Sum((dying,))]
    failure = store.failure(dying)
    assert failure is not None
    assert failure["error"].startswith("WorkerDied")


def test_dask(tmp_path: Path, importable: str) -> None:
    """Catches faults that threads hide: jobs that cannot be pickled, missing needs, an open client."""
    distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    store = Store(tmp_path)
    first, second = Number(1.0), Number(2.0)
    failing, total = Failing(str(tmp_path / "cure")), Sum((first, second))
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None
    ) as cluster:
        make = executor(f"dask:{cluster.scheduler_address}", 1)
        summary = run_all([total, failing], store, HERE, make_executor=make)
        assert not [name for name in cluster.scheduler.clients if name.startswith("Client-")]
    assert set(summary.done) == {first, second, total}
    assert summary.failed == [failing]
    assert store.result(total) == {"value": 3.0}


def test_submitit(tmp_path: Path, importable: str) -> None:
    """Catches a sweep that waits for a handle instead of asking it, as jobs of Slurm are asked."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    store = Store(tmp_path / "runs")
    make = executor(f"local:{tmp_path / 'logs'},timeout_min=3", 1)
    summary = run_all([Number(1.0)], store, HERE, make_executor=make)
    assert summary.done == [Number(1.0)]
    assert store.result(Number(1.0)) == {"value": 1.0}
    assert list((tmp_path / "logs").glob("*_log.out"))


@pytest.mark.parametrize(
    ("name", "workers", "says"),
    [
        ("threads", 1, "executor='threads': expected processes, dask:ADDRESS"),
        ("dask", 1, "expected processes, dask:ADDRESS"),
        ("processes:4", 1, "expected processes, dask:ADDRESS"),
        ("slurm:", 1, "expected processes, dask:ADDRESS"),
        ("processes", 0, "workers=0: expected at least 1"),
        ("local:logs,long", 1, "'long', expected KEY=VALUE"),
    ],
)
def test_what_no_executor_is(name: str, workers: int, says: str) -> None:
    """Catches a mistyped executor that falls back to another, or fails hours later."""
    with pytest.raises(ValueError, match=says):
        executor(name, workers)


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from inside another package, or from a missing one."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    with pytest.raises(ValueError, match=r"executor=local:.*'speed'"):
        executor(f"local:{tmp_path},local_speed=3", 1)()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("dask:tcp://127.0.0.1:1", "slurm:logs"):
        with pytest.raises(ValueError, match=r"pip install 'stableopt\[bench-cluster\]'"):
            executor(name, 1)


def test_threads_of_workers_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches waiting threads that spin: `make demo` took over ten minutes on a busy machine."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # what the test changes is then undone
    monkeypatch.delenv("OMP_WAIT_POLICY")
    with executor("processes", 1)() as pool:  # type: ignore[attr-defined]
        assert pool.submit(os.getenv, "OMP_WAIT_POLICY").result() == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    executor("processes", 1)
    assert os.environ["OMP_WAIT_POLICY"] == "active"  # a user's choice stays
