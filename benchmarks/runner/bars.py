"""Progress bars for the jobs that run, and a line for each that has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from benchmarks.runner.estimate import costs, time_left
from benchmarks.runner.files import read_json
from benchmarks.runner.job import Job
from benchmarks.runner.schedule import Watch
from benchmarks.runner.store import Store

__all__ = ["Bars"]

LOOK_SECONDS = 0.5


class Bars(Watch):
    """Bars on a terminal: one for all jobs, with the time left, and one for each that runs.

    The first goes by what jobs cost, and not by how many there are: the last may be the longest.

    Args:
        jobs: all there are, with what they need.
        store: where they report how far they are.
        console: where to draw.
        headline: gives a line to print when a job is done, or ``None``.
        device: that they run on.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        store: Store,
        console: Console,
        headline: Callable[[Job], str | None] = lambda job: None,
        device: str = "cpu",
    ) -> None:
        self.store, self.console, self.headline = store, console, headline
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _LeftColumn(),
            console=console,
            transient=True,
            expand=True,
        )
        told = costs(jobs, store, device)
        # Where no job says what it costs, all count alike.
        self.costs = told if any(told.values()) else dict.fromkeys(told, 1.0)
        ended = [job for job in jobs if store.done(job)]
        self.ended, self.count, self.lost = len(ended), len(jobs), 0
        self.spent = sum(self.costs[job.id] for job in ended)
        self.total = sum(self.costs.values())
        self.bars: dict[str, tuple[Job, TaskID, Pace]] = {}
        self.looked = 0.0
        self.pace = Pace()
        self.all = self.progress.add_task("", total=1.0, pace=self.pace)
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
        """Add bars."""
        for job in jobs:
            pace = Pace()
            bar = self.progress.add_task(job.id, total=1.0, pace=pace)
            self.bars[job.id] = (job, bar, pace)

    def finished(self, job: Job, seconds: float | None) -> None:
        """Print the job's line, if it has one."""
        self.ended += 1
        self.spent += self.costs[job.id]
        self._end(job)
        self.pace.see(self._share())
        line = self.headline(job)
        if line is not None:
            self.console.print(line, highlight=False)

    def failed(self, job: Job, error: str) -> None:
        """Print the error."""
        self._lose(job)
        self.console.print(f"[red]failed[/red] {job.id}: {escape(error)}", highlight=False)

    def blocked(self, job: Job) -> None:
        """Count the job no more."""
        self._lose(job)

    def tick(self) -> None:
        """Look how far the jobs are, now and then."""
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked = time.monotonic()
        for job, bar, pace in self.bars.values():
            try:
                told = read_json(self.store.part(job) / "progress.json")
            except (OSError, ValueError):  # not yet there, or just gone
                continue
            pace.see(min(max(float(told["share"]), 0.0), 1.0))
            text = escape(told["text"] or job.id)
            self.progress.update(bar, completed=pace.share, description=text)
        if any(pace.share for _, _, pace in self.bars.values()):
            self.pace.see(self._share())
        self._show()

    def _end(self, job: Job) -> None:
        if job.id in self.bars:
            _, bar, _ = self.bars.pop(job.id)
            self.progress.remove_task(bar)
        self._show()

    def _lose(self, job: Job) -> None:
        self.lost += 1
        self.total -= self.costs[job.id]
        self._end(job)

    def _share(self) -> float:
        running = sum(self.costs[name] * pace.share for name, (_, _, pace) in self.bars.items())
        return (self.spent + running) / self.total if self.total > 0 else 0.0

    def _show(self) -> None:
        lost = f", {self.lost} failed or blocked" if self.lost else ""
        text = f"[bold]{self.ended} of {self.count} jobs{lost}[/bold]"
        self.progress.update(self.all, completed=self._share(), description=text)


class Pace:
    """When something will end, from how it has gone on since it was first seen.

    What comes before that is no work: processes that start, jobs that were done another day.

    Args:
        clock: tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.share = clock, 0.0
        self.ends: float | None = None
        self._first: tuple[float, float] | None = None

    def see(self, share: float) -> None:
        """Take note that ``share`` is done."""
        now = self.clock()
        if self._first is None:
            self._first = (now, share)
        if share != self.share:
            left = time_left(now - self._first[0], self._first[1], share)
            self.ends = None if left is None else now + left
        self.share = share

    @property
    def left(self) -> float | None:
        """Seconds; ``None`` while there is nothing to tell it from."""
        return None if self.ends is None else max(self.ends - self.clock(), 0.0)


class _LeftColumn(ProgressColumn):
    """The time left, as far as it can be told."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        said = "" if left is None else f"{timedelta(seconds=round(left))} left"
        return Text(said.rjust(12), style="progress.remaining", no_wrap=True)
