"""`main`: the subcommands, from ``list`` and ``run`` to ``report`` and ``perf``."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from benchmarks.agenda import missing, seconds_of
from benchmarks.experiments import NAMES
from benchmarks.experiments import experiment as experiment_class
from benchmarks.framework.experiment import PRESETS, Experiment
from benchmarks.framework.publish import publish
from benchmarks.framework.publish import redraw as redraw_tables
from benchmarks.framework.settings import configured
from benchmarks.framework.terminal import LEGEND
from benchmarks.perf import BY_DEFAULT, PARTS
from benchmarks.report import report as written_report
from benchmarks.runner import Store, in_order
from benchmarks.runner.files import read_json
from benchmarks.runner.schedule import shard as jobs_of_shard
from benchmarks.sweep_runner import SweepRunner
from benchmarks.sweeps import remembered

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
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return code


@app.command(name="list")
def list_all() -> int:
    """List the experiments and the timings."""
    for name in NAMES:
        print(f"{name:<16}{experiment_class(name).about()[0]}")
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
        names: experiments to run, or ``all``.
        preset: smoke takes seconds, small minutes; paper has the paper's sizes.
        seeds: as in 0,1,2: replaces the preset's seeds.
        data: digits, which come with scikit-learn; fashion-mnist, cifar10-2 or cifar10.
        set: any other setting, several values separated by commas; may be repeated.
        workers: number of parallel jobs.
        executor: processes, dask:ADDRESS or slurm:FOLDER.
        shard: as in 1/4: run the first of four parts of the jobs.
        ensemble: number of runs with equal shapes to train as one.
        retry: run failed jobs again.
        dry_run: list the jobs and start nothing.
        device: cpu or cuda.
        data_dir: folder of the data; missing files are downloaded into it.
        out: folder for runs, tables and figures.
    """
    if not names:
        raise ValueError(f"run: expected NAME, one or more of {', '.join(NAMES)}, or all")
    all_names = "all" in names
    for name in names:
        if name != "all":
            experiment_class(name)  # raises for an unknown one, also next to "all"
    if ensemble < 0:
        raise ValueError(f"--ensemble {ensemble}: expected at least 0")
    if seeds is not None and not seeds.strip():
        raise ValueError("--seeds is empty: expected numbers, as in 0,1,2")
    settings = [*set, *([f"seeds={seeds}"] if seeds else [])]
    experiments = [
        _configured(name, preset, data, settings, any_data=all_names)
        for name in (NAMES if all_names else names)
    ]
    runner = SweepRunner(Store(out), workers, executor, device, data_dir)
    runner.console.print(LEGEND, highlight=False)
    unsuccessful = 0
    for experiment in experiments:
        jobs = jobs_of_shard(experiment.jobs(), *_shard(shard)) if shard else experiment.jobs()
        remaining = runner.announce(experiment, preset, jobs)
        if dry_run:
            for job in remaining:
                runner.console.print(f"  {job.id}  {job.config}", highlight=False, soft_wrap=True)
            continue
        members = ensemble or (ENSEMBLE_ON_CUDA if device.startswith("cuda") else 1)
        summary = runner.run(experiment, preset, jobs, members=members, retry=retry)
        unsuccessful += len(summary.failed) + len(summary.blocked)
    return 1 if unsuccessful else 0


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
    """Run the unfinished experiments of a preset, in order of value, until the time is up.

    Unpublished experiments come first, and among these the paper's own tables and figures; then
    the quickest. An interrupted job continues from its checkpoint the next time.

    Args:
        preset: smoke takes seconds, small minutes to hours; paper has the paper's sizes.
        time_budget: as in 90s, 20m or 3h.
        workers: number of parallel jobs.
        dry_run: print the order and start nothing.
        data_dir: folder of the data; missing files are downloaded into it.
        out: folder for runs, tables and figures.
        results: the published results.
    """
    budget = seconds_of(time_budget)
    runner = SweepRunner(Store(out), workers, "processes", "cpu", data_dir)
    agenda = missing(preset, runner.store, results, workers)
    runner.show_agenda(agenda, preset)
    if dry_run:
        return 0
    end, unsuccessful = time.monotonic() + budget, 0
    runner.console.print(LEGEND, highlight=False)
    for part in agenda:
        seconds_left = end - time.monotonic()
        if seconds_left <= 0:
            break
        runner.announce(part.experiment, preset, part.experiment.jobs())
        summary = runner.run(part.experiment, preset, part.experiment.jobs(), seconds=seconds_left)
        unsuccessful += len(summary.failed) + len(summary.blocked)
    runner.show_agenda(missing(preset, runner.store, results, workers), preset)
    return 1 if unsuccessful else 0


def _configured(
    name: str, preset: str, data: str | None, settings: list[str], *, any_data: bool
) -> Experiment:
    kind = experiment_class(name)
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


def _warn_skipped(path: Path, error: Exception) -> None:
    """Print the path of a sweep's file that this version cannot read, and the error."""
    Console(stderr=True).print(f"skipped {path}: {error}", soft_wrap=True, markup=False)


@app.command
def status(out: Path = RUNS) -> int:
    """Print the number of done, running and failed jobs of each sweep.

    Args:
        out: folder of the runs.
    """
    console, store = Console(), Store(out)
    table = Table(title=f"Sweeps in {out}")
    for heading in ("experiment", "preset", "data", "jobs", "done", "running", "failed", "left"):
        table.add_column(heading, min_width=len(heading))
    errors = []
    for preset, experiment in remembered(out, _warn_skipped):
        jobs = in_order(experiment.jobs())
        remaining = [job for job in jobs if not store.done(job)]
        failures = {job.id: store.failure(job) for job in remaining}
        failed = {name: failure for name, failure in failures.items() if failure}
        done, left = len(jobs) - len(remaining), len(remaining) - len(failed)
        running = sum(map(store.running, remaining))
        counts = (len(jobs), done, running, len(failed), left)
        table.add_row(experiment.name, preset, experiment.data, *map(str, counts))
        errors += [f"{name}: {escape(failure['error'])}" for name, failure in failed.items()]
    console.print(table)
    for error in errors:
        console.print(f"[red]failed[/red] {error}", highlight=False)
    return 0


@app.command
def figures(names: Names = (), into: Path | None = None, out: Path = RUNS) -> int:
    """Write tables and pictures of the finished jobs, without training.

    Args:
        names: experiments; all by default.
        into: folder to write to; by default the folder of the runs.
        out: folder of the runs.
    """
    sweeps = [
        (preset, experiment)
        for preset, experiment in remembered(out, _warn_skipped)
        if not names or experiment.name in names
    ]
    if not sweeps:
        raise ValueError(f"figures: nothing was run in {out}, 'run NAME --out {out}' comes first")
    for preset, experiment in sweeps:
        files = publish(experiment, preset, Store(out), into or out)
        text = f"{experiment.name}: {len(files)} files in {files[-1].parent}"
        Console().print(text, soft_wrap=True)
    return 0


@app.command
def redraw(names: Names = (), results: Path = RESULTS) -> int:
    """Draw published tables again, and check their claims, after a change of a figure.

    Args:
        names: experiments; all by default.
        results: folder that ``figures --into`` wrote.
    """
    folders = [path.parent for path in sorted(results.glob("*/*/*/about.json"))]
    chosen = [folder for folder in folders if not names or folder.name in names]
    if not chosen:
        raise ValueError(f"redraw: nothing was published in {results}, 'figures --into' fills it")
    for folder in chosen:
        settings = read_json(folder / "about.json")["settings"]
        experiment = experiment_class(folder.name).from_json(settings)
        files = redraw_tables(experiment, folder, sorted(folder.glob("*.csv")))
        text = f"{folder.name}: {len(files)} files in {folder}"
        Console().print(text, soft_wrap=True)
    return 0


@app.command
def report(results: Path = RESULTS, to: Path | None = None) -> int:
    """Write the report: the paper's numbers next to ours.

    Args:
        results: folder that ``figures --into`` wrote.
        to: file to write; by default REPORT.md next to the results.
    """
    if not any((results / preset).is_dir() for preset in PRESETS):
        raise ValueError(f"report: {results} is empty, 'figures --into {results}' fills it")
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
        parts: timings to run; all but ``large`` by default.
        data: digits, fashion-mnist, cifar10-2 or cifar10.
        data_dir: folder of the data; missing files are downloaded into it.
        device: cpu or cuda.
        seed: seed of networks and data.
        set: any other setting, several values separated by commas; may be repeated.
        out: folder for numbers and figures.
    """
    unknown = {*parts} - {*PARTS}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    options = {"data": data, "data_dir": data_dir, "device": device, "seed": seed, "out": out}
    chosen: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    modules = [importlib.import_module(PARTS[name]) for name in parts or BY_DEFAULT]
    configs = [configured(module.Config(**chosen), set) for module in modules]
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
    """Run the GPU checks and timings, in order of value, until the time is up.

    Each part is a process with its own time limit, and its result is written when it ends. Parts that
    failed or could not run are listed with the reason; the exit code is 1 if a part failed.

    Args:
        parts: parts to run; all by default.
        time_budget: as in 90s or 8m.
        device: cuda, cuda:1, or simulated, the tests' accelerator, on which parts run in miniature.
        data_dir: folder of the data; by default the environment's ``STABLEOPT_DATA``.
        out: folder for gpu.md, gpu.json, and the results and the output of each part.
    """
    from benchmarks.gpu import script  # imports every package that it times

    budget = seconds_of(time_budget)
    script.check(device, parts)
    outcomes = script.run(device, out, seconds=budget, names=parts, data_dir=data_dir)
    print(f"Written: {out / 'gpu.md'}")
    return 1 if any(part.outcome in ("failed", "stopped") for part in outcomes) else 0
