"""Progress bars for the jobs that run, and a line for each that has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.runner.job import Job
from benchmarks.runner.schedule import Watch
from benchmarks.runner.store import Store, read_json

__all__ = ["Bars"]

LOOK_SECONDS = 0.5


class Bars(Watch):
    """Bars on a terminal: one for all jobs, with the time left, and one for each that runs.

    Args:
        jobs: all there are, with what they need.
        store: where they report how far they are.
        console: where to draw.
        headline: gives a line to print when a job is done, or ``None``.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        store: Store,
        console: Console,
        headline: Callable[[Job], str | None] = lambda job: None,
    ) -> None:
        self.store, self.console, self.headline = store, console, headline
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        done = sum(map(store.done, jobs))
        self.all = self.progress.add_task("jobs", total=len(jobs), completed=done)
        self.bars: dict[str, tuple[Job, TaskID]] = {}
        self.looked = 0.0

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def started(self, jobs: Sequence[Job]) -> None:
        """Add bars."""
        for job in jobs:
            self.bars[job.id] = (job, self.progress.add_task(job.id, total=1.0))

    def finished(self, job: Job, seconds: float | None) -> None:
        """Print the job's line, if it has one."""
        self._end(job)
        line = self.headline(job)
        if line is not None:
            self.console.print(line, highlight=False)

    def failed(self, job: Job, error: str) -> None:
        """Print the error."""
        self._end(job)
        self.console.print(f"[red]failed[/red] {job.id}: {error}", highlight=False)

    def tick(self) -> None:
        """Look how far the jobs are, now and then."""
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        for job, bar in self.bars.values():
            note = self.store.part(job) / "progress.json"
            try:
                told = read_json(note)
            except (OSError, ValueError):  # not yet there, or just gone
                continue
            self.progress.update(bar, completed=told["share"], description=told["text"] or job.id)

    def _end(self, job: Job) -> None:
        _, bar = self.bars.pop(job.id, (job, None))
        if bar is not None:
            self.progress.remove_task(bar)
        self.progress.advance(self.all)
