"""Running jobs on an executor: in the order of their needs, whatever happens to single ones.

Whatever has ``submit(function, *arguments)`` and returns something with ``done()`` and ``result()``
will do: the executors of ``concurrent.futures``, of Dask (``client.get_executor()``), of mpi4py,
and submitit's, whose jobs are asked and never waited for. Workers write their own results; nothing
comes back but how long they took.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.runner.job import Job, Place, in_order
from benchmarks.runner.store import Store
from benchmarks.runner.work import work

__all__ = ["Executor", "Summary", "Watch", "run_all", "shard"]

POLL_SECONDS = 0.02
WORKER_DIED = "WorkerDied: the process that ran this job ended without a word; memory, or a signal?"


class Executor(Protocol):
    """What jobs are given to."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begin a call; return a handle with ``done()`` and ``result()``."""


class Watch:
    """Who wants to know; does nothing itself."""

    def started(self, jobs: Sequence[Job]) -> None:
        """Jobs were handed to a worker."""

    def finished(self, job: Job, seconds: float | None) -> None:
        """A job is done; ``None`` seconds if another process did it."""

    def failed(self, job: Job, error: str) -> None:
        """A job has ended with an error."""

    def tick(self) -> None:
        """Some time has passed."""


@dataclass
class Summary:
    """What became of the jobs.

    Attributes:
        found: were done before.
        done: have been done now.
        failed: have ended with an error, now or before.
        blocked: need one that failed.
    """

    found: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    blocked: list[Job] = field(default_factory=list)


def shard(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return the ``index``-th (from 0) of ``count`` parts of ``jobs``.

    Jobs that stand on the same first need are kept together, so that no two machines compute it.

    Raises:
        ValueError: unless 0 <= index < count.
    """
    if not 0 <= index < count:
        raise ValueError(f"shard {index + 1}/{count}: expected from 1/{count} to {count}/{count}")

    def root(job: Job) -> str:
        return root(job.needs[0]) if job.needs else job.id

    return [job for job in jobs if int(root(job).rpartition("-")[2], 16) % count == index]


def run_all(
    jobs: Iterable[Job],
    store: Store,
    place: Place,
    *,
    make_executor: Callable[[], Executor] = lambda: ThreadPoolExecutor(1),
    in_flight: int | None = None,
    members: int = 1,
    retry: bool = False,
    watch: Watch | None = None,
) -> Summary:
    """Run jobs and what they need, but for those that are done.

    Args:
        jobs: in any order.
        store: where their folders are.
        place: where they run.
        make_executor: makes what runs them; called again if it breaks, as a process pool does when
            one of its processes dies. The jobs that it was running are then run one at a time, so
            that the one that is to blame costs only itself.
        in_flight: the most that are handed to the executor at a time; all by default.
        members: the most that may be run as one ensemble.
        retry: run those that failed again.
        watch: is told what happens.

    Returns:
        What became of each. Failures are recorded in the folders, and raise nothing here.
    """
    return _Run(store, place, make_executor, in_flight, members, watch or Watch()).of(
        in_order(list(jobs)), retry
    )


class _Run:
    def __init__(
        self,
        store: Store,
        place: Place,
        make_executor: Callable[[], Executor],
        in_flight: int | None,
        members: int,
        watch: Watch,
    ) -> None:
        self.store, self.place, self.watch = store, place, watch
        self.make_executor, self.members = make_executor, members
        self.in_flight = in_flight or 10**9
        self.summary = Summary()
        self.running: dict[Any, list[Job]] = {}
        self.suspects: deque[Job] = deque()

    def of(self, jobs: list[Job], retry: bool) -> Summary:
        waiting: dict[str, Job] = {}
        for job in jobs:
            if self.store.done(job):
                self.summary.found.append(job)
                continue
            failure = self.store.failure(job)
            if failure is not None and not retry:
                self._fail(job, failure["error"])
                continue
            if failure is not None:
                self.store.forget(job)
            waiting[job.id] = job
        executor = self.make_executor() if waiting else None
        try:
            while waiting or self.suspects or self.running:
                assert executor is not None
                self._block(waiting)
                broken = self._submit(executor, waiting) or self._collect()
                if broken:
                    _shut(executor)
                    executor = self.make_executor()
                self.watch.tick()
        finally:
            if executor is not None:
                _shut(executor)
        return self.summary

    def _fail(self, job: Job, error: str) -> None:
        self.summary.failed.append(job)
        self.watch.failed(job, error)

    def _block(self, waiting: dict[str, Job]) -> None:
        lost = {job.id for job in self.summary.failed + self.summary.blocked}
        for job in list(waiting.values()):
            if any(need.id in lost for need in job.needs):
                self.summary.blocked.append(waiting.pop(job.id))
                lost.add(job.id)

    def _submit(self, executor: Executor, waiting: dict[str, Job]) -> bool:
        """Hand over what is ready; say whether the executor refused, being broken."""
        if self.suspects:
            if self.running:
                return False
            return not self._start(executor, [self.suspects[0]])
        while len(self.running) < self.in_flight:
            ready = [j for j in waiting.values() if all(map(self.store.done, j.needs))]
            if not ready:
                break
            first = ready[0]
            group = [first]
            if self.members > 1 and first.together is not None:
                alike = (
                    j for j in ready if type(j) is type(first) and j.together == first.together
                )
                group = list(alike)[: self.members]
            if not self._start(executor, group):
                return True
            for job in group:
                del waiting[job.id]
        return False

    def _start(self, executor: Executor, group: list[Job]) -> bool:
        try:
            handle = executor.submit(work, group, self.store.root, self.place)
        except BrokenExecutor:
            return False
        self.running[handle] = group
        self.watch.started(group)
        return True

    def _collect(self) -> bool:
        """Take what has ended; say whether the executor has broken."""
        ended = [handle for handle in self.running if handle.done()]
        if not ended:
            time.sleep(POLL_SECONDS)
            return False
        broken = False
        for handle in ended:
            group = self.running.pop(handle)
            alone = bool(self.suspects) and group == [self.suspects[0]]
            try:
                times = handle.result()
            except BrokenExecutor:
                broken = True
                if not alone:
                    self.suspects.extend(group)
                    continue
                self.store.fail(self.suspects[0], WORKER_DIED)
                times = {}
            except (
                Exception
            ) as error:  # the executor's own: Dask's KilledWorker, a job of Slurm lost
                for job in group:
                    self.store.fail(job, f"{WORKER_DIED} ({type(error).__name__})", str(error))
                times = {}
            if alone:
                self.suspects.popleft()
            for job in group:
                self._take(job, times.get(job.id))
        return broken

    def _take(self, job: Job, seconds: float | None) -> None:
        if self.store.done(job):
            self.summary.done.append(job)
            self.watch.finished(job, seconds)
            return
        failure = self.store.failure(job) or {"error": WORKER_DIED}
        self._fail(job, failure["error"])


def _shut(executor: Executor) -> None:
    shut = getattr(executor, "shutdown", None)
    if shut is not None:
        shut(wait=True)
