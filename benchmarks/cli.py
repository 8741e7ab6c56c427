"""`main`: the subcommands, from ``list`` and ``run`` to ``report`` and ``perf``."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from benchmarks.agenda import Part, missing, seconds_of
from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.experiment import PRESETS, Experiment
from benchmarks.framework.publish import publish
from benchmarks.framework.settings import configured
from benchmarks.framework.terminal import LEGEND, show
from benchmarks.perf import BY_DEFAULT, PARTS
from benchmarks.report import report as written_report
from benchmarks.runner import Job, Place, Store, in_order, run_all
from benchmarks.runner.bars import Bars
from benchmarks.runner.estimate import estimate, readable
from benchmarks.runner.schedule import Summary
from benchmarks.runner.schedule import shard as jobs_of_shard
from benchmarks.runner.workers import executor as made_executor
from benchmarks.sweeps import remember, remembered

__all__ = ["main"]

RUNS = Path("runs")
RESULTS = Path(__file__).parent / "results"
ENSEMBLE_ON_CUDA = 16

app = tyro.extras.SubcommandApp()

Names = Annotated[Positional[tuple[str, ...]], arg(metavar="NAME")]
Set = Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE,…")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        code: int = app.cli(
            prog="python -m benchmarks", description=__doc__, args=arguments, config=()
        )
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return code


@app.command(name="list")
def list_all() -> int:
    """List the experiments and the timings."""
    for name in NAMES:
        print(f"{name:<16}{experiment(name).about()[0]}")
    for name, path in PARTS.items():
        print(f"perf {name:<11}{(importlib.import_module(path).__doc__ or '').splitlines()[0]}")
    return 0


@app.command
def run(
    names: Names,
    preset: Literal[PRESETS] = "small",  # type: ignore[valid-type]
    seeds: str | None = None,
    data: str | None = None,
    set: Set = (),
    workers: Annotated[int, arg(aliases=["-j"])] = 1,
    executor: str = "processes",
    shard: str | None = None,
    ensemble: int = 0,
    retry: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    data_dir: Path | None = None,
    out: Path = RUNS,
) -> int:
    """Run experiments, or continue them: jobs that are done are kept.

    Args:
        names: of experiments, or ``all``.
        preset: smoke takes seconds, small minutes; paper has the paper's sizes.
        seeds: as in 0,1,2: instead of the preset's.
        data: digits, which are embedded; fashion-mnist, cifar10-2 or cifar10.
        set: any other setting, several values with commas; may be repeated.
        workers: jobs at a time.
        executor: or dask:ADDRESS, slurm:FOLDER.
        shard: as in 1/4: the first of four parts of the jobs.
        ensemble: how many runs of the same shapes to train as one.
        retry: run failed jobs again.
        dry_run: list the jobs and start nothing.
        device: cpu or cuda.
        data_dir: where the data are, or are downloaded to.
        out: folder for everything.
    """
    if not names:
        raise ValueError(f"run: expected NAME, one or more of {', '.join(NAMES)}, or all")
    several = "all" in names
    settings = [*set, *([f"seeds={seeds}"] if seeds else [])]
    chosen = [
        _configured(name, preset, data, settings, any_data=several)
        for name in (NAMES if several else names)
    ]
    runner = _Runner(Store(out), workers, executor, device, data_dir)
    runner.console.print(LEGEND, highlight=False)
    lost = 0
    for one in chosen:
        jobs = jobs_of_shard(one.jobs(), *_shard(shard)) if shard else one.jobs()
        left = runner.announce(one, preset, jobs)
        if dry_run:
            for job in left:
                runner.console.print(f"  {job.id}  {job.config}", highlight=False, soft_wrap=True)
            continue
        members = ensemble or (ENSEMBLE_ON_CUDA if device.startswith("cuda") else 1)
        summary = runner.run(one, preset, jobs, members=members, retry=retry)
        lost += len(summary.failed) + len(summary.blocked)
    return 1 if lost else 0


@app.command
def paper(
    preset: Literal[PRESETS] = "small",  # type: ignore[valid-type]
    time_budget: str = "3h",
    workers: Annotated[int, arg(aliases=["-j"])] = 1,
    dry_run: bool = False,
    data_dir: Path | None = None,
    out: Path = RUNS,
    results: Path = RESULTS,
) -> int:
    """Run what is missing of a preset in order of value, until the time is up.

    First what is not published yet, and of this the paper's own tables and figures; then the
    quickest. What the time does not suffice for continues from its checkpoints the next time.

    Args:
        preset: smoke takes seconds, small minutes to hours; paper has the paper's sizes.
        time_budget: as in 90s, 20m or 3h.
        workers: jobs at a time.
        dry_run: print the order and start nothing.
        data_dir: where the data are, or are downloaded to.
        out: folder for everything.
        results: the published results.
    """
    budget = seconds_of(time_budget)
    runner = _Runner(Store(out), workers, "processes", "cpu", data_dir)
    agenda = missing(preset, runner.store, results, workers)
    runner.show_agenda(agenda, preset)
    if dry_run:
        return 0
    end, lost = time.monotonic() + budget, 0
    runner.console.print(LEGEND, highlight=False)
    for part in agenda:
        left = end - time.monotonic()
        if left <= 0:
            break
        runner.announce(part.experiment, preset, part.experiment.jobs())
        summary = runner.run(part.experiment, preset, part.experiment.jobs(), seconds=left)
        lost += len(summary.failed) + len(summary.blocked)
    runner.show_agenda(missing(preset, runner.store, results, workers), preset)
    return 1 if lost else 0


class _Runner:
    """Runs the jobs of experiments, and prints and publishes what comes of them."""

    def __init__(
        self, store: Store, workers: int, executor: str, device: str, data_dir: Path | None
    ) -> None:
        self.console, self.store, self.workers, self.device = Console(), store, workers, device
        self.make_executor = made_executor(executor, workers)
        self.local = executor == "processes"
        threads = max(1, torch.get_num_threads() // workers) if self.local else None
        self.place = Place(device, data_dir, threads)

    def announce(self, one: Experiment, preset: str, jobs: Sequence[Job]) -> list[Job]:
        """Print what is to do; return it."""
        everything = in_order(jobs)
        left = [job for job in everything if not self.store.done(job)]
        time_left = readable(estimate(everything, self.store, self.workers, self.device))
        self.console.print(
            f"[bold]{one.name}[/bold]: {one.shows}\n{preset} preset, {one.data}:"
            f" {len(everything)} jobs, {len(left)} to do ({time_left})",
            highlight=False,
        )
        return left

    def run(
        self,
        one: Experiment,
        preset: str,
        jobs: Sequence[Job],
        *,
        members: int = 1,
        retry: bool = False,
        seconds: float = math.inf,
    ) -> Summary:
        """Run the jobs; print and publish what came out."""
        store, console = self.store, self.console
        remember(one, preset, store)
        headline = partial(one.headline, store=store)
        with Bars(in_order(jobs), store, console, headline, self.device) as bars:
            summary = run_all(
                jobs,
                store,
                self.place,
                make_executor=self.make_executor,
                in_flight=self.workers if self.local else None,
                members=members,
                retry=retry,
                seconds=seconds,
                watch=bars,
            )
        # Published first: what is shown, claims, may need jobs that are not done.
        files = publish(one, preset, store, store.root)
        show(console, one, one.tables(store))
        if summary.failed:
            console.print(
                f"[red]{len(summary.failed)} failed[/red], {len(summary.blocked)} wait for these;"
                f" --retry runs them again. The errors are in {store.jobs}/ID.part/failed.json",
                highlight=False,
            )
        console.print(
            f"Tables and figures in {files[-1].parent}\n", highlight=False, soft_wrap=True
        )
        return summary

    def show_agenda(self, agenda: Sequence[Part], preset: str) -> None:
        """Print what is missing, in order."""
        table = Table(title=f"Missing of the {preset} preset in {self.store.root}")
        for heading in ("experiment", "shows", "data", "jobs left", "time, roughly"):
            table.add_column(heading, overflow="fold")
        for part in agenda:
            one = part.experiment
            table.add_row(one.name, one.shows, one.data, str(part.jobs), readable(part.seconds))
        if agenda:
            self.console.print(table)
        else:
            self.console.print(f"Nothing of the {preset} preset is missing.")


def _configured(
    name: str, preset: str, data: str | None, settings: list[str], *, any_data: bool
) -> Experiment:
    kind = experiment(name)
    if data not in (None, *kind.datasets):
        if not any_data:
            raise ValueError(f"{name}: --data {data}, expected {' or '.join(kind.datasets)}")
        data = None
    return configured(kind.preset(preset, data), settings)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard {text}: expected I/N, as in 1/4")
    return int(index) - 1, int(count)


def _say_skipped(path: Path, error: Exception) -> None:
    """Name the file of a sweep that this version cannot read."""
    Console(stderr=True).print(f"skipped {path}: {error}", soft_wrap=True, markup=False)


@app.command
def status(out: Path = RUNS) -> int:
    """Print for each sweep what is done, runs and has failed.

    Args:
        out: folder of the runs.
    """
    console, store = Console(), Store(out)
    table = Table(title=f"Sweeps in {out}")
    for heading in ("experiment", "preset", "data", "jobs", "done", "running", "failed", "left"):
        table.add_column(heading, min_width=len(heading))
    errors = []
    for preset, one in remembered(out, _say_skipped):
        jobs = in_order(one.jobs())
        left = [job for job in jobs if not store.done(job)]
        failed = {job.id: failure for job in left if (failure := store.failure(job))}
        running = sum(map(store.running, left))
        counts = (len(jobs), len(jobs) - len(left), running, len(failed), len(left) - len(failed))
        table.add_row(one.name, preset, one.data, *map(str, counts))
        errors += [f"{name}: {escape(failure['error'])}" for name, failure in failed.items()]
    console.print(table)
    for error in errors:
        console.print(f"[red]failed[/red] {error}", highlight=False)
    return 0


@app.command
def figures(names: Names = (), into: Path | None = None, out: Path = RUNS) -> int:
    """Write the tables and pictures of what is done; trains nothing.

    Args:
        names: of experiments; all by default.
        into: folder to write to; by default that of the runs.
        out: folder of the runs.
    """
    chosen = [
        (p, one) for p, one in remembered(out, _say_skipped) if not names or one.name in names
    ]
    if not chosen:
        raise ValueError(f"figures: nothing was run in {out}")
    for preset, one in chosen:
        files = publish(one, preset, Store(out), into or out)
        Console().print(f"{one.name}: {len(files)} files in {files[-1].parent}", soft_wrap=True)
    return 0


@app.command
def report(results: Path = RESULTS, to: Path | None = None) -> int:
    """Write the report: what is printed, and what came out.

    Args:
        results: what ``figures`` wrote.
        to: file; by default REPORT.md in the folder above the results.
    """
    if not any((results / preset).is_dir() for preset in PRESETS):
        raise ValueError(f"report: {results} is empty: 'figures --into' fills it")
    path = to or results.parent / "REPORT.md"
    path.write_text(written_report(results, results.name))
    Console().print(f"Written: {path}", soft_wrap=True)
    return 0


@app.command
def perf(
    parts: Annotated[Positional[tuple[str, ...]], arg(metavar="PART")] = (),
    data: str | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
    seed: int | None = None,
    set: Set = (),
    out: Path | None = None,
) -> int:
    """Time this library and others, side by side.

    Args:
        parts: of the timings; all but ``large`` by default.
        data: digits, fashion-mnist, cifar10-2 or cifar10.
        data_dir: where the data are, or are downloaded to.
        device: cpu or cuda.
        seed: of networks and data.
        set: any other setting, several values with commas; may be repeated.
        out: folder for numbers and figures.
    """
    unknown = {*parts} - {*PARTS}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    named = {"data": data, "data_dir": data_dir, "device": device, "seed": seed, "out": out}
    given: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    modules = [importlib.import_module(PARTS[name]) for name in parts or BY_DEFAULT]
    configs = [configured(module.Config(**given), set) for module in modules]
    for module, config in zip(modules, configs, strict=True):
        module.run(config)
    return 0


@app.command
def gpu(
    parts: Annotated[Positional[tuple[str, ...]], arg(metavar="PART")] = (),
    time_budget: str = "8m",
    device: str = "cuda",
    data_dir: Path | None = None,
    out: Path = Path("gpu"),
) -> int:
    """Run everything worth knowing about a GPU, in order of value, until the time is up.

    Each part is a process with its own time limit, and its result is written when it ends. What failed
    or could not run is listed with the reason; the exit code is 1 if a part failed.

    Args:
        parts: of the script; all by default.
        time_budget: as in 90s or 8m.
        device: cuda, cuda:1, or simulated: all parts in miniature, on the accelerator of the tests.
        data_dir: where the data are; by default the environment's ``STABLEOPT_DATA``.
        out: folder for gpu.md, gpu.json, and the results and the output of each part.
    """
    from benchmarks.gpu import script  # its parts import all that they time

    budget = seconds_of(time_budget)
    script.check(device, parts)
    outcomes = script.run(device, out, seconds=budget, names=parts, data_dir=data_dir)
    print(f"Written: {out / 'gpu.md'}")
    return 1 if any(one.outcome in ("failed", "stopped") for one in outcomes) else 0
