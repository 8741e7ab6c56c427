"""Which jobs run, in which order, and the consequences of failures; on threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import runner_jobs
from runner_jobs import Alone, Dying, Failing, Member, Number, Sum, Unwritable, Walk

from benchmarks.runner import Job, Place, Store, run_all
from benchmarks.runner.estimate import estimate
from benchmarks.runner.execute import work
from benchmarks.runner.schedule import WORKER_DIED, Watch, shard

HERE = Place()


class Log(Watch):
    """Records what it is notified of."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def started(self, jobs: Sequence[Job]) -> None:
        self.lines += [("started", job.id) for job in jobs]

    def finished(self, job: Job, seconds: float | None) -> None:
        self.lines.append(("finished", job.id))

    def failed(self, job: Job, error: str) -> None:
        self.lines.append((error, job.id))

    def blocked(self, job: Job) -> None:
        self.lines.append(("blocked", job.id))


class Inline:
    """An executor that runs one call each time it is asked for progress, and counts submitted calls."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self.most = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.append((future, function, arguments))
        self.most = max(self.most, len(self.queue))
        future.done = lambda: self.step(future)  # type: ignore[method-assign]
        return future

    def step(self, asked: Future[Any]) -> bool:
        if self.queue and self.queue[0][0] is asked:
            future, function, arguments = self.queue.popleft()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            return True
        return False


def test_needs_are_run_before_and_only_what_is_left_is_run(tmp_path: Path) -> None:
    """Catches a job before its needs, and one that is run twice."""
    first, second = Number(1.0), Number(2.0)
    total = Sum((first, second))
    store = Store(tmp_path)
    run_all([first], store, HERE)
    log = Log()
    summary = run_all([total], store, HERE, watch=log)
    assert (summary.already_done, summary.done) == ([first], [second, total])
    assert log.lines == [
        (word, job.id) for job in (second, total) for word in ("started", "finished")
    ]
    assert store.result(total) == {"value": 3.0}
    again = run_all([total], store, HERE, make_executor=lambda: pytest.fail("nothing to run"))
    assert again.already_done == [first, second, total]


def test_what_others_wait_for_goes_first(tmp_path: Path) -> None:
    """Catches a critical path that waits for jobs that no other job needs."""
    lone, need = Number(1.0), Number(2.0)
    total = Sum((need,))
    log = Log()
    run_all([lone, total], Store(tmp_path), HERE, in_flight=1, watch=log)
    started = [id for word, id in log.lines if word == "started"]
    assert started == [need.id, lone.id, total.id]


def test_a_failure_costs_what_stands_on_it_and_is_not_run_again_unasked(tmp_path: Path) -> None:
    """Catches a failure that counts as done, ends the sweep, is silently run again or hidden, and a
    job that waits for it forever, at any distance.
    """
    store, cure = Store(tmp_path), tmp_path / "cure"
    failing, fine = Failing(str(cure)), Number(1.0)
    total = Sum((fine, failing))
    over = Sum((total,))
    jobs = [failing, fine, Unwritable(), total, over]
    log = Log()
    summary = run_all(jobs, store, HERE, watch=log)
    assert summary.done == [fine]
    assert summary.failed == [failing, Unwritable()]
    assert summary.blocked == [total, over]
    assert ("ArithmeticError: no cure", failing.id) in log.lines
    assert [line for line in log.lines if line[0] == "blocked"] == [
        ("blocked", total.id),
        ("blocked", over.id),
    ]
    cure.touch()
    unasked = run_all(jobs, store, HERE, watch=(log := Log()))
    assert (unasked.already_done, unasked.failed, unasked.blocked) == (
        [fine],
        [failing, Unwritable()],
        [total, over],
    )
    assert ("ArithmeticError: no cure", failing.id) in log.lines
    assert not [line for line in log.lines if line[0] == "started"]
    retried = run_all(jobs, store, HERE, retry=True)
    assert retried.failed == [Unwritable()]
    assert set(retried.done) == {failing, total, over}
    assert retried.blocked == []
    assert store.result(over) == {"value": 2.0}


def test_an_exit_in_a_job_is_no_exit_of_the_sweep(tmp_path: Path) -> None:
    """Catches a job's SystemExit, which is not an Exception, that ends the parent."""
    store = Store(tmp_path)
    summary = run_all([Dying("sys.exit"), Number(1.0)], store, HERE)
    assert (summary.failed, summary.done) == ([Dying("sys.exit")], [Number(1.0)])
    failure = store.failure(Dying("sys.exit"))
    assert failure is not None
    assert failure["error"].startswith("SystemExit: which is")


def test_an_executors_own_error_is_the_jobs(tmp_path: Path) -> None:
    """Catches an error that ends the sweep, and one whose many lines are all shown as its name."""

    class Losing(Inline):
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            def lose(jobs: list[Job], *rest: Any) -> Any:
                if jobs == [Number(1.0)]:
                    raise LookupError("lost\non the way")
                results = function(jobs, *rest)
                if jobs == [Number(2.0)]:
                    raise LookupError("lost after the work was done")
                return results

            return super().submit(lose, *arguments)

    store = Store(tmp_path)
    jobs = [Number(x) for x in (1.0, 2.0, 3.0)]
    summary = run_all(jobs, store, HERE, make_executor=Losing)
    assert summary.failed == [Number(1.0)]
    assert summary.done == [Number(2.0), Number(3.0)]
    failure = {"error": "LookupError: lost", "details": "lost\non the way"}
    assert store.failure(Number(1.0)) == failure
    assert not store.part(Number(2.0)).exists()


def test_who_breaks_an_executor_is_found_by_running_suspects_alone(tmp_path: Path) -> None:
    """Catches a job blamed for another's crash, a crashing one that is retried forever, and an
    executor that is not recreated, or refuses work, after it has broken.
    """
    made: list[Inline] = []

    class Breaking(Inline):
        broken = False

        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            if self.broken:
                raise BrokenExecutor

            def risk(jobs: list[Job], *rest: Any) -> Any:
                if self.broken or Number(3.0) in jobs:
                    self.broken = True
                    raise BrokenExecutor
                return function(jobs, *rest)

            return super().submit(risk, *arguments)

    def make() -> Inline:
        made.append(Breaking())
        return made[-1]

    store = Store(tmp_path)
    jobs = [Number(float(x)) for x in range(8)]
    summary = run_all(jobs, store, HERE, make_executor=make, in_flight=3)
    assert summary.failed == [Number(3.0)]
    assert set(summary.done) == set(jobs) - {Number(3.0)}
    assert store.failure(Number(3.0)) == {"error": WORKER_DIED, "details": ""}
    # The first, one after it broke, and one after the crashing job broke it alone, or two if another
    # was in flight when the first broke.
    assert 3 <= len(made) <= 5


def test_jobs_that_a_broken_executor_lost_are_left_when_time_is_up(tmp_path: Path) -> None:
    """Catches jobs that are in no list: neither failed nor left for the next call."""

    class Broken(Inline):
        def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
            def risk(*_: Any) -> Any:
                time.sleep(0.1)
                raise BrokenExecutor

            return super().submit(risk, *arguments)

    jobs = [Number(1.0), Number(2.0)]
    summary = run_all(jobs, Store(tmp_path), HERE, make_executor=Broken, seconds=0.05)
    assert sorted(job.id for job in summary.left) == sorted(job.id for job in jobs)


@pytest.mark.parametrize(("in_flight", "most"), [(1, 1), (3, 3), (None, 8)])
def test_no_more_are_handed_over_than_asked(
    tmp_path: Path, in_flight: int | None, most: int
) -> None:
    """Catches all jobs submitted at once: if the pool broke, all of them would be suspects."""
    executor = Inline()
    jobs = [Number(float(x)) for x in range(8)]
    run_all(jobs, Store(tmp_path), HERE, make_executor=lambda: executor, in_flight=in_flight)
    assert executor.most == most


def test_ensembles_are_of_one_kind_and_no_larger_than_asked(tmp_path: Path) -> None:
    """Catches members of different groups in one ensemble, one that cannot be run with others, one
    with a checkpoint of its own, which an ensemble would throw away, and jobs that are lost.
    """
    store = Store(tmp_path)
    begun = Member(9)
    store.part(begun).mkdir(parents=True)
    (store.part(begun) / "checkpoint.pt").touch()
    jobs: list[Job] = [
        *(Member(x) for x in range(5)),
        *(Member(x, group="b") for x in (5, 6)),
        *(Member(x, group=None) for x in (7, 8)),
        begun,
        Number(1.0),
    ]
    summary = run_all(jobs, store, HERE, members=3)
    assert set(summary.done) == set(jobs)
    members = [store.result(job)["with"] for job in jobs[:-1]]
    assert members == [[0, 1, 2]] * 3 + [[3, 4]] * 2 + [[5, 6]] * 2 + [[7], [8], [9]]
    alone = run_all(jobs, Store(tmp_path / "alone"), HERE)
    assert [Store(tmp_path / "alone").result(job)["with"] for job in alone.done[:5]] == [
        [x] for x in range(5)
    ]


def test_threads_run_one_job_at_a_time(tmp_path: Path) -> None:
    """Catches two jobs in one process at a time, which would share the global random generator."""
    runner_jobs.INSIDE[:] = [0, 0]
    jobs = [Alone(x) for x in range(6)]
    summary = run_all(jobs, Store(tmp_path), HERE, make_executor=lambda: ThreadPoolExecutor(3))
    assert set(summary.done) == set(jobs)
    assert runner_jobs.INSIDE == [0, 1]


def test_an_interruption_cancels_what_was_not_begun(tmp_path: Path) -> None:
    """Catches an interrupted sweep that first finishes all submitted jobs."""

    class Impatient(Watch):
        def finished(self, job: Job, seconds: float | None) -> None:
            raise KeyboardInterrupt

    store = Store(tmp_path)
    jobs = [Walk(seed, steps=3) for seed in range(50)]
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, store, HERE, watch=Impatient())
    # The one that was finished, and those of the moment until it was noticed.
    assert 1 <= sum(map(store.done, jobs)) < 50


def test_nothing_begins_after_the_time(tmp_path: Path) -> None:
    """Catches a time budget that applies only to executors that can stop running jobs."""
    store = Store(tmp_path)
    jobs = [Number(1.0), Number(2.0)]
    summary = run_all(jobs, store, HERE, seconds=-1.0)
    assert (summary.left, summary.done) == (jobs, [])
    assert run_all(jobs, store, HERE).done == jobs


def test_shards_are_a_partition_that_keeps_together_what_belongs_together() -> None:
    """Catches a job in no shard or in two, and a minimum that two machines compute."""
    jobs: list[Job] = [Number(float(x)) for x in range(40)]
    jobs += [Sum((job,)) for job in jobs]
    jobs += [Sum((job,)) for job in jobs[40:]]
    parts = [shard(jobs, k, 3) for k in range(3)]
    assert sorted(job.id for part in parts for job in part) == sorted(job.id for job in jobs)
    # Forty fair throws of a die with three sides leave none below 4 but once in ten thousand.
    assert min(len(part) for part in parts) > 3 * 4
    for part in parts:
        assert all(need in part for job in part for need in job.needs)
    assert shard(jobs, 0, 1) == jobs
    for index, count in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"shard {index + 1}/{count}: expected"):
            shard(jobs, index, count)


def test_the_estimate_goes_by_what_such_jobs_took(tmp_path: Path) -> None:
    """Catches an inverted rate of seconds and operations, and an estimate that ignores workers."""

    class Costly(Number):
        kind = "costly"

        @property
        def flops(self) -> float:
            return self.x

    store = Store(tmp_path)
    done, left = Costly(100.0), Costly(1000.0)
    work([done], tmp_path, HERE)
    seconds = store.about(done)["seconds"]
    # Ten times the operations on half the workers: float rounding only.
    assert estimate([done, left], store, 2) == pytest.approx(5 * seconds)
    assert estimate([done], store, 1) == 0
    assert estimate([Costly(1e9)], Store(tmp_path / "new"), 1) > 0
    assert estimate([Number(1.0)], store, 1) == 0
