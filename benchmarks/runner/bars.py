"""`Bars`: progress bars of the running jobs, and a line for each finished one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from benchmarks.runner.estimate import costs
from benchmarks.runner.files import read_json
from benchmarks.runner.job import Job
from benchmarks.runner.schedule import Watch
from benchmarks.runner.store import Store

__all__ = ["Bars"]

READ_SECONDS = 0.5
"""Seconds between two reads of the jobs' progress files."""

SPEED_PERIOD = 24 * 3600.0
"""Seconds of past progress from which rich estimates the time left: a day, in effect all."""


class Bars(Watch):
    """Progress bars: one for the whole sweep, with the time left, and one for each running job.

    The sweep's bar weights jobs by their estimated cost, since jobs differ much in length.

    Args:
        jobs: all jobs of the sweep, with those that they need.
        store: the store in which they report their progress.
        console: the console to draw on.
        headline: returns the line to print when a job is done, or ``None``.
        device: device of the jobs.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        store: Store,
        console: Console,
        headline: Callable[[Job], str | None] = lambda job: None,
        device: str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.console, self.headline = store, console, headline
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
            get_time=clock,
            speed_estimate_period=SPEED_PERIOD,
        )
        seconds = costs(jobs, store, device)
        # If no job states its cost, all count alike.
        self.costs = seconds if any(seconds.values()) else dict.fromkeys(seconds, 1.0)
        ended = [job for job in jobs if store.done(job)]
        self.ended, self.count, self.lost = len(ended), len(jobs), 0
        self.spent = sum(self.costs[job.id] for job in ended)
        self.total = sum(self.costs.values())
        self.bars: dict[str, tuple[Job, TaskID]] = {}
        self.last_read = 0.0
        # Work of earlier runs is where the bar starts, so that it does not count as speed.
        self.all = self.progress.add_task("", total=1.0, completed=self._share())
        self._show()

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
        """Add bars; a job that a broken executor lost starts again."""
        for job in jobs:
            if job.id in self.bars:
                self.progress.remove_task(self.bars[job.id][1])
            self.bars[job.id] = (job, self.progress.add_task(job.id, total=1.0))

    def finished(self, job: Job, seconds: float | None) -> None:
        """Print the job's line, if it has one."""
        self.ended += 1
        self.spent += self.costs[job.id]
        self._end(job)
        line = self.headline(job)
        if line is not None:
            self.console.print(line, highlight=False)

    def failed(self, job: Job, error: str) -> None:
        """Print the error."""
        self.blocked(job)
        self.console.print(f"[red]failed[/red] {job.id}: {escape(error)}", highlight=False)

    def blocked(self, job: Job) -> None:
        """Exclude the job from the total."""
        self.lost += 1
        self.total -= self.costs[job.id]
        self._end(job)

    def tick(self) -> None:
        """Update the bars from the jobs' progress files, at most every ``READ_SECONDS``."""
        if time.monotonic() - self.last_read < READ_SECONDS:
            return
        self.last_read = time.monotonic()
        for job, bar in self.bars.values():
            try:
                progress = read_json(self.store.part(job) / "progress.json")
            except (OSError, ValueError):  # not written yet, or already removed
                continue
            share = min(max(float(progress["share"]), 0.0), 1.0)
            self._move(bar, share, escape(progress["text"] or job.id))
        self._show()

    def _move(self, bar: TaskID, share: float, text: str) -> None:
        if share < self._done(bar):  # the job started again
            self.progress.reset(bar, completed=share)
        if share != self._done(bar):
            self.progress.update(bar, completed=share)
        self.progress.update(bar, description=text)

    def _done(self, bar: TaskID) -> float:
        return next(task.completed for task in self.progress.tasks if task.id == bar)

    def _end(self, job: Job) -> None:
        if job.id in self.bars:
            self.progress.remove_task(self.bars.pop(job.id)[1])
        self._show()

    def _share(self) -> float:
        running = sum(self.costs[name] * self._done(bar) for name, (_, bar) in self.bars.items())
        return (self.spent + running) / self.total if self.total > 0 else 0.0

    def _show(self) -> None:
        lost = f", {self.lost} failed or blocked" if self.lost else ""
        self._move(self.all, self._share(), f"[bold]{self.ended} of {self.count} jobs{lost}[/bold]")
