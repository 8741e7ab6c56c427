"""`run_all`: runs jobs on an executor in the order of their needs, even if some of them fail.

An executor has ``submit(function, *arguments)``, which returns a handle with ``done()``, ``result()``
and ``cancel()``: those of ``concurrent.futures``, Dask (``client.get_executor()``), mpi4py and submitit.
Handles are polled, never waited for. Workers write their own results and return only times.
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
    "WorkerDied: the process that ran this job ended without an error; memory, or a signal?"
)


class Executor(Protocol):
    """Runs jobs; ``shutdown()`` is called if it has one, and before it ``stop()`` if time is up."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Begin a call; return a handle with ``done()``, ``result()`` and ``cancel()``."""


class Watch:
    """Receives what happens to jobs; the base class ignores it."""

    def started(self, jobs: Sequence[Job]) -> None:
        """Jobs were handed to a worker."""

    def finished(self, job: Job, seconds: float | None) -> None:
        """A job is done; ``None`` seconds if another process did it."""

    def failed(self, job: Job, error: str) -> None:
        """A job has ended with an error."""

    def blocked(self, job: Job) -> None:
        """A job will not be run, because one that it needs has failed."""

    def tick(self) -> None:
        """Some time has passed."""


@dataclass
class Summary:
    """The jobs by how they ended.

    Attributes:
        found: were done before.
        done: have been done now.
        failed: have ended with an error, now or before.
        blocked: need one that failed.
        left: were not begun, or not ended, when the time was up.
    """

    found: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    failed: list[Job] = field(default_factory=list)
    blocked: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)


def shard(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return the ``index``-th (from 0) of ``count`` parts of ``jobs``.

    Jobs with the same first need stay together, so that only one machine computes it.

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
    """Run jobs and what they need, except those that are done.

    Args:
        jobs: in any order.
        store: where their folders are.
        place: where they run.
        make_executor: makes what runs them; called again if it breaks, as a process pool does when
            one of its processes dies. The jobs that it was running are then run one at a time, so
            that only the job at fault is lost.
        in_flight: the most that are handed to the executor at a time; all by default.
        members: the most that may be run as one ensemble.
        retry: run those that failed again.
        seconds: after which nothing more begins, and what runs is stopped if the executor can, as a
            process pool can. The next run continues it from its last checkpoint.
        watch: receives what happens.

    Returns:
        The jobs by how they ended. Failures are recorded in their folders, not raised.
    """
    end = time.monotonic() + seconds
    return _Run(store, place, make_executor, in_flight, members, end, watch or Watch()).of(
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

    def of(self, jobs: list[Job], retry: bool) -> Summary:
        waiting: dict[str, Job] = {}
        for job in jobs:
            if self.store.done(job):
                self.summary.found.append(job)
                self.done.add(job.id)
                continue
            failure = self.store.failure(job)
            if failure is not None and not retry:
                self._fail(job, failure["error"])
                continue
            if failure is not None:
                self.store.forgive(job)
            waiting[job.id] = job
        self._block(waiting)
        executor = self.make_executor() if waiting else None
        try:
            while waiting or self.suspects or self.running:
                assert executor is not None
                if time.monotonic() > self.end:
                    running = [job for group in self.running.values() for job in group]
                    self.summary.left += [*running, *waiting.values()]
                    if hasattr(executor, "stop"):
                        executor.stop()
                        self.running.clear()
                    break
                broken = self._submit(executor, waiting) or self._collect()
                if broken:
                    _call(executor, "shutdown")
                    executor = self.make_executor()
                self._block(waiting)
                self.watch.tick()
        finally:
            # Some are left only after an interruption.
            for handle in self.running:
                handle.cancel()
            if executor is not None:
                _call(executor, "shutdown")
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
        """Submit what is ready; say whether the executor is broken."""
        if self.suspects:
            if self.running:
                return False
            return not self._start(executor, [self.suspects[0]])
        room = self.in_flight - len(self.running)
        if room <= 0:
            return False
        ready = [j for j in waiting.values() if self.done.issuperset(n.id for n in j.needs)]
        # Jobs that others wait for go first, since the longest chain decides when all is done.
        needed = {need.id for job in waiting.values() for need in job.needs}
        ready.sort(key=lambda job: job.id not in needed)
        for group in self._grouped(ready)[:room]:
            if not self._start(executor, group):
                return True
            for job in group:
                del waiting[job.id]
        return False

    def _grouped(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Return jobs in their order, in ensembles where they can run together."""
        groups: list[list[Job]] = []
        unfilled: dict[tuple[object, ...], list[Job]] = {}
        for job in jobs:
            alone = self.members < 2 or job.together is None or self.store.begun(job)
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
        """Collect what has ended; say whether the executor is broken."""
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
                self._record(group, WORKER_DIED)
                times = {}
            except Exception as error:
                # The executor's own: a KilledWorker of Dask, a job lost by Slurm, one not pickled.
                first = str(error).partition("\n")[0]
                self._record(group, f"{type(error).__name__}: {first}", str(error))
                times = {}
            if alone:
                self.suspects.popleft()
            for job in group:
                self._take(job, times.get(job.id))
        return broken

    def _record(self, group: list[Job], error: str, details: str = "") -> None:
        for job in group:
            if not self.store.done(job):  # the worker may have ended after its work
                self.store.fail(job, error, details)

    def _take(self, job: Job, seconds: float | None) -> None:
        if self.store.done(job):
            self.done.add(job.id)
            self.summary.done.append(job)
            self.watch.finished(job, seconds)
            return
        failure = self.store.failure(job) or {"error": WORKER_DIED}
        self._fail(job, failure["error"])


def _call(executor: Executor, name: str) -> None:
    method = getattr(executor, name, None)
    if method is not None:
        method()
