"""`run_all`: runs jobs on an executor in the order of their needs; failures do not stop the others.

An executor has ``submit(function, *arguments)``, which returns a handle with ``done()``, ``result()``
and ``cancel()``, as in ``concurrent.futures``, Dask (``client.get_executor()``), mpi4py and submitit.
Handles are polled. Workers write their own results and return only times.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.runner.execute import work
from benchmarks.runner.job import Job, in_order
from benchmarks.runner.place import Place
from benchmarks.runner.store import Store

__all__ = ["Executor", "Summary", "Watch", "run_all", "shard"]

POLL_SECONDS = 0.02
WORKER_DIED = (
    "WorkerDied: the worker process ended during this job, out of memory or killed by a signal?"
)


class Executor(Protocol):
    """Runs jobs. ``shutdown()``, if it has one, is called at the end, after ``stop()`` if time is up."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Schedule a call; return a handle with ``done()``, ``result()`` and ``cancel()``."""


class Watch:
    """Receives the events of a sweep; the base class ignores them."""

    def started(self, jobs: Sequence[Job]) -> None:
        """Jobs were handed to a worker."""

    def finished(self, job: Job, seconds: float | None) -> None:
        """A job is done; ``seconds`` is ``None`` if another process ran it."""

    def failed(self, job: Job, error: str) -> None:
        """A job failed."""

    def blocked(self, job: Job) -> None:
        """A job cannot run, because a job that it needs failed."""

    def tick(self) -> None:
        """Called on each pass of the scheduler's loop."""


@dataclass
class Summary:
    """The jobs by outcome.

    Attributes:
        already_done: done before this call.
        done: done by this call.
        failed: failed, now or before.
        blocked: not run, because a job that they need failed.
        left: not started, or not finished, when the time was up.
    """

    already_done: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    blocked: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)


def shard(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return the ``index``-th (from 0) of ``count`` parts of ``jobs``.

    Jobs with the same first need stay in one part, so that only one machine computes it.

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
    seconds: float = math.inf,
    watch: Watch | None = None,
) -> Summary:
    """Run jobs and the jobs that they need, except those that are done.

    Args:
        jobs: in any order.
        store: the store of their folders.
        place: device, data folder and threads.
        make_executor: creates the executor, and a new one if it breaks, as a process pool does when
            a process dies. The jobs that it was running are then rerun one at a time, so that only
            the job at fault fails.
        in_flight: largest number of groups submitted at a time; unlimited by default.
        members: largest number of jobs in an ensemble.
        retry: run failed jobs again.
        seconds: time limit. After it no job starts, and running jobs are stopped if the executor has
            ``stop``. The next call resumes these from their last checkpoint.
        watch: receives the events.

    Returns:
        The jobs by outcome. Errors are recorded in the jobs' folders, not raised.
    """
    end = time.monotonic() + seconds
    return _Run(store, place, make_executor, in_flight, members, end, watch or Watch()).run(
        in_order(list(jobs)), retry
    )


class _Run:
    """The state of one call of :func:`run_all`.

    ``lost`` holds the ids of failed and blocked jobs. ``suspects`` were running when an executor
    broke; they run alone, one after the other.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        make_executor: Callable[[], Executor],
        in_flight: int | None,
        members: int,
        end: float,
        watch: Watch,
    ) -> None:
        self.store, self.place, self.end, self.watch = store, place, end, watch
        self.make_executor, self.members = make_executor, members
        self.in_flight = in_flight or 10**9
        self.summary = Summary()
        self.done: set[str] = set()
        self.lost: set[str] = set()
        self.running: dict[Any, list[Job]] = {}
        self.suspects: deque[Job] = deque()

    def run(self, jobs: list[Job], retry: bool) -> Summary:
        waiting: dict[str, Job] = {}
        for job in jobs:
            if self.store.done(job):
                self.summary.already_done.append(job)
                self.done.add(job.id)
                continue
            failure = self.store.failure(job)
            if failure is not None and not retry:
                self._fail(job, failure["error"])
                continue
            if failure is not None:
                self.store.clear_failure(job)
            waiting[job.id] = job
        self._block(waiting)
        executor = self.make_executor() if waiting else None
        try:
            while waiting or self.suspects or self.running:
                assert executor is not None
                if time.monotonic() > self.end:
                    running = [job for group in self.running.values() for job in group]
                    suspects = [job for job in self.suspects if job not in running]
                    self.summary.left += [*running, *suspects, *waiting.values()]
                    if hasattr(executor, "stop"):
                        executor.stop()
                        self.running.clear()
                    break
                broken = self._submit(executor, waiting) or self._collect()
                if broken:
                    _shut_down(executor)
                    executor = self.make_executor()
                self._block(waiting)
                self.watch.tick()
        finally:
            # Handles remain only after an interruption.
            for handle in self.running:
                handle.cancel()
            if executor is not None:
                _shut_down(executor)
        return self.summary

    def _fail(self, job: Job, error: str) -> None:
        self.summary.failed.append(job)
        self.lost.add(job.id)
        self.watch.failed(job, error)

    def _block(self, waiting: dict[str, Job]) -> None:
        if not self.lost:
            return
        for job in list(waiting.values()):
            if any(need.id in self.lost for need in job.needs):
                self.summary.blocked.append(waiting.pop(job.id))
                self.lost.add(job.id)
                self.watch.blocked(job)

    def _submit(self, executor: Executor, waiting: dict[str, Job]) -> bool:
        """Submit the jobs that are ready; return whether the executor is broken."""
        if self.suspects:
            if self.running:
                return False
            return not self._start(executor, [self.suspects[0]])
        room = self.in_flight - len(self.running)
        if room <= 0:
            return False
        ready = [job for job in waiting.values() if all(need.id in self.done for need in job.needs)]
        # Jobs that others need go first, since the longest chain determines the total time.
        needed = {need.id for job in waiting.values() for need in job.needs}
        ready.sort(key=lambda job: job.id not in needed)
        for group in self._grouped(ready)[:room]:
            if not self._start(executor, group):
                return True
            for job in group:
                del waiting[job.id]
        return False

    def _grouped(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Return jobs in groups of at most ``members`` that can run as one ensemble, in order."""
        groups: list[list[Job]] = []
        unfilled: dict[tuple[object, ...], list[Job]] = {}
        for job in jobs:
            alone = self.members < 2 or job.together is None or self.store.has_checkpoint(job)
            key = None if alone else (type(job), job.together)
            if key is not None and len(unfilled.get(key, ())) in range(1, self.members):
                unfilled[key].append(job)
                continue
            groups.append([job])
            if key is not None:
                unfilled[key] = groups[-1]
        return groups

    def _start(self, executor: Executor, group: list[Job]) -> bool:
        try:
            handle = executor.submit(work, group, self.store.root, self.place)
        except BrokenExecutor:
            return False
        self.running[handle] = group
        self.watch.started(group)
        return True

    def _collect(self) -> bool:
        """Record the calls that have ended; return whether the executor is broken."""
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
                self._record_error(group, WORKER_DIED)
                times = {}
            except Exception as error:
                # An error of the executor itself: Dask's KilledWorker, a lost Slurm job, pickling.
                first_line = str(error).partition("\n")[0]
                self._record_error(group, f"{type(error).__name__}: {first_line}", str(error))
                times = {}
            if alone:
                self.suspects.popleft()
            for job in group:
                self._record_end(job, times.get(job.id))
        return broken

    def _record_error(self, group: list[Job], error: str, details: str = "") -> None:
        for job in group:
            if not self.store.done(job):  # the worker may have died after finishing the job
                self.store.fail(job, error, details)

    def _record_end(self, job: Job, seconds: float | None) -> None:
        if self.store.done(job):
            self.done.add(job.id)
            self.summary.done.append(job)
            self.watch.finished(job, seconds)
            return
        failure = self.store.failure(job) or {"error": WORKER_DIED}
        self._fail(job, failure["error"])


def _shut_down(executor: Executor) -> None:
    if hasattr(executor, "shutdown"):
        executor.shutdown()
