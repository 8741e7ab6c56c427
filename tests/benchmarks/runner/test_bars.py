"""Progress bars go by the jobs' cost, from the first job that is seen at work."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from runner_jobs import Failing, Number, Sum

from benchmarks.runner import Place, Store, run_all
from benchmarks.runner.bars import Bars
from benchmarks.runner.files import write_json


class Costly(Number):
    """Costs as much as its number says."""

    kind = "costly"

    @property
    def flops(self) -> float:
        return self.x


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_the_time_left_is_that_of_the_work_seen(tmp_path: Path) -> None:
    """Catches start-up time, or earlier sweeps' results, counted as work.

    Also catches a remaining time that grows while nothing is reported.
    """
    now = 100.0
    store, before, job = Store(tmp_path), Costly(1.0), Costly(2.0)
    run_all([before], store, Place())
    bars = Bars([before, job], store, quiet(), clock=lambda: now)
    everything = bars.progress.tasks[0]
    assert everything.time_remaining is None
    bars.started([job])
    store.part(job).mkdir(parents=True)

    def report(share: float) -> None:
        write_json(store.part(job) / "progress.json", {"share": share, "text": ""})
        bars.last_read = 0.0
        bars.tick()

    now = 160.0
    report(0.25)
    now = 170.0
    report(0.5)
    bar = bars.progress.tasks[1]
    # A quarter in the ten seconds between two reports: twenty seconds for the half that is left.
    assert bar.time_remaining == 20
    assert everything.time_remaining == pytest.approx(20, abs=1)  # whole seconds, rounded up
    now = 174.0
    report(0.5)
    assert bar.time_remaining == 20
    report(0.25)  # started again
    assert bar.time_remaining is None


def test_the_bar_goes_by_cost_and_not_by_number(tmp_path: Path) -> None:
    """Catches a bar that counts jobs: it would be nearly full before a last job of most of the work."""
    store = Store(tmp_path)
    small, large = [Costly(float(x)) for x in (1, 2, 3)], Costly(54.0)
    bars = Bars([*small, large], store, quiet())
    for job in small:
        bars.started([job])
        bars.finished(job, 1.0)
    shown = bars.progress.tasks[0]
    # Costs are those numbers times one factor: float rounding only.
    assert shown.completed == pytest.approx(0.1)
    assert "3 of 4 jobs" in shown.description
    bars.started([large])
    store.part(large).mkdir(parents=True)
    write_json(store.part(large) / "progress.json", {"share": 0.5, "text": "half [way]"})
    bars.tick()
    assert shown.completed == pytest.approx(0.1 + 0.9 * 0.5)
    with bars.console.capture() as shot:
        bars.console.print(bars.progress.get_renderable())
    assert "half [way]" in shot.get()
    bars.failed(large, "E: [no]")
    # Lost jobs no longer count as work.
    assert shown.completed == pytest.approx(1.0)
    assert f"failed {large.id}: E: [no]" in bars.console.file.getvalue()


def test_where_no_job_tells_its_cost_all_count_alike(tmp_path: Path) -> None:
    """Catches a division by no cost at all."""
    bars = Bars([Number(1.0), Number(2.0)], Store(tmp_path), quiet())
    bars.finished(Number(1.0), 1.0)
    assert bars.progress.tasks[0].completed == 0.5
    assert Bars([], Store(tmp_path), quiet()).progress.tasks[0].completed == 0.0


def test_a_job_that_starts_again_has_one_bar(tmp_path: Path) -> None:
    """Catches the bar of a job that a broken executor lost, which stays on the screen."""
    job = Number(1.0)
    with Bars([job], Store(tmp_path), quiet()) as bars:
        bars.started([job])
        bars.started([job])
        bars.finished(job, 1.0)
        assert len(bars.progress.tasks) == 1  # that of the sweep


def test_bars_follow_a_whole_run(tmp_path: Path) -> None:
    """Catches a bar that stays on the screen, a line that is not printed, and an uncounted job."""
    failing = Failing(str(tmp_path / "cure"))
    jobs = [Number(1.0), Number(2.0), failing, Sum((failing,))]
    store, console = Store(tmp_path), quiet()
    with Bars(jobs, store, console, lambda job: f"done {job.id}") as bars:
        run_all(jobs, store, Place(), watch=bars)
    (left,) = bars.progress.tasks
    assert left.completed == 1.0
    assert "2 of 4 jobs, 2 failed or blocked" in left.description
    output = console.file.getvalue()
    for job in jobs[:2]:
        assert f"done {job.id}" in output
    assert "ArithmeticError: no cure" in output
