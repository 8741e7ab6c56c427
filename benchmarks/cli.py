"""What the subcommands do."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.experiments import NAMES, experiment
from benchmarks.framework.experiment import PRESETS, Experiment
from benchmarks.framework.publish import publish
from benchmarks.framework.settings import parsed, parsed_value
from benchmarks.perf import PARTS
from benchmarks.report import report as written_report
from benchmarks.runner import Job, Place, Store, run_all
from benchmarks.runner.bars import Bars
from benchmarks.runner.estimate import estimate, readable
from benchmarks.runner.job import in_order
from benchmarks.runner.schedule import shard
from benchmarks.runner.store import read_json, write_json
from benchmarks.runner.workers import executor

__all__ = ["figures", "list_all", "perf", "report", "run", "status"]

ENSEMBLE_ON_CUDA = 16


def list_all(options: argparse.Namespace, console: Console) -> int:
    """Name experiments and timings."""
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.experiments.{name.replace('-', '_')}")
        print(f"{name:<16}{(module.__doc__ or '').splitlines()[0]}")
    for name, path in PARTS.items():
        print(f"perf {name:<11}{(importlib.import_module(path).__doc__ or '').splitlines()[0]}")
    return 0


def run(options: argparse.Namespace, console: Console) -> int:
    """Run experiments; what is done already is not done again."""
    names = NAMES if "all" in options.names else options.names
    chosen = [_configured(name, options) for name in names]
    store = Store(options.out)
    device = options.device or "cpu"
    make_executor = executor(options.executor, options.workers)
    # Each worker gets its share of the threads that torch would take: a core's each, or what
    # OMP_NUM_THREADS says. More threads than cores stand in each other's way.
    threads = max(1, torch.get_num_threads() // options.workers)
    place = Place(device, options.data_dir, threads if options.executor == "processes" else None)
    failed = 0
    for one in chosen:
        jobs = one.jobs()
        if options.shard:
            jobs = shard(jobs, *_shard(options.shard))
        everything = in_order(jobs)
        left = [job for job in everything if not store.done(job)]
        time_left = readable(estimate(everything, store, options.workers, device))
        console.print(
            f"[bold]{one.name}[/bold] ({one.shows}), {options.preset} preset, {one.data}:"
            f" {len(everything)} jobs, {len(left)} to do: {time_left} or so",
            highlight=False,
        )
        if options.dry_run:
            for job in left:
                console.print(f"  {job.id}  {job.config}", highlight=False, soft_wrap=True)
            continue
        _remember(one, options.preset, store)
        members = options.ensemble or (ENSEMBLE_ON_CUDA if device.startswith("cuda") else 1)
        foretell = partial(one.foretell, store=store)
        with Bars(everything, store, console, foretell, device) as bars:
            summary = run_all(
                jobs,
                store,
                place,
                make_executor=make_executor,
                in_flight=options.workers if options.executor == "processes" else None,
                members=members,
                retry=options.retry,
                watch=bars,
            )
        failed += len(summary.failed) + len(summary.blocked)
        one.show(console, one.tables(store))
        if summary.failed:
            console.print(
                f"[red]{len(summary.failed)} failed[/red], {len(summary.blocked)} wait for these;"
                f" --retry runs them again. The errors are in {store.jobs}/ID.part/failed.json",
                highlight=False,
            )
        files = publish(one, options.preset, store, options.out)
        console.print(
            f"Tables and figures in {files[-1].parent}\n", highlight=False, soft_wrap=True
        )
    return 1 if failed else 0


def _configured(name: str, options: argparse.Namespace) -> Experiment:
    kind = experiment(name)
    settings = parsed(kind, options.set)
    if options.seeds:
        settings["seeds"] = parsed_value(kind, "seeds", options.seeds)
    data = options.data if options.data in (None, *kind.datasets) else None
    if options.data != data and "all" not in options.names:
        raise ValueError(f"{name}: --data {options.data}, expected {' or '.join(kind.datasets)}")
    return kind.preset(options.preset, data, **settings)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard {text}: expected I/N, as in 1/4")
    return int(index) - 1, int(count)


def _remember(one: Experiment, preset: str, store: Store) -> None:
    sweeps = store.root / "sweeps"
    sweeps.mkdir(parents=True, exist_ok=True)
    path = sweeps / f"{preset}-{one.data}-{one.name}.json"
    write_json(path, {"experiment": one.name, "preset": preset, "settings": one.settings})


def _remembered(root: Path) -> Iterator[tuple[str, Experiment]]:
    sweeps = [read_json(path) for path in (root / "sweeps").glob("*.json")]
    for sweep in sorted(sweeps, key=lambda s: (NAMES.index(s["experiment"]), s["preset"])):
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in sweep["settings"].items()}
        yield sweep["preset"], experiment(sweep["experiment"])(**settings)


def status(options: argparse.Namespace, console: Console) -> int:
    """Say of each sweep what is done."""
    store = Store(options.out)
    table = Table(title=f"Sweeps in {options.out}")
    for heading in ("experiment", "preset", "data", "jobs", "done", "running", "failed", "left"):
        table.add_column(heading)
    errors = []
    for preset, one in _remembered(options.out):
        jobs = in_order(one.jobs())
        done = [job for job in jobs if store.done(job)]
        failures = {job.id: store.failure(job) for job in jobs if not store.done(job)}
        failed = {name: failure for name, failure in failures.items() if failure}
        running = [job for job in jobs if job.id in failures and _runs(job, store)]
        left = len(jobs) - len(done) - len(failed)
        counts = (len(jobs), len(done), len(running), len(failed), left)
        table.add_row(one.name, preset, one.data, *map(str, counts))
        errors += [f"{name}: {escape(failure['error'])}" for name, failure in failed.items()]
    console.print(table)
    for error in errors:
        console.print(f"[red]failed[/red] {error}", highlight=False)
    return 0


def _runs(job: Job, store: Store) -> bool:
    if not store.part(job).exists():
        return False
    lock = store.lock(job)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return True
    lock.release()
    return False


def figures(options: argparse.Namespace, console: Console) -> int:
    """Write tables and pictures of what there is."""
    known = list(_remembered(options.out))
    chosen = [(p, one) for p, one in known if not options.names or one.name in options.names]
    if not chosen:
        raise ValueError(f"figures: nothing was run in {options.out}")
    for preset, one in chosen:
        files = publish(one, preset, Store(options.out), options.into or options.out)
        console.print(f"{one.name}: {len(files)} files in {files[-1].parent}", soft_wrap=True)
    return 0


def report(options: argparse.Namespace, console: Console) -> int:
    """Write the report."""
    if not any((options.results / preset).is_dir() for preset in PRESETS):
        raise ValueError(f"report: {options.results} is empty: 'figures --into' fills it")
    path = options.to or options.results.parent / "REPORT.md"
    path.write_text(written_report(options.results, options.results.name))
    console.print(f"Written: {path}", soft_wrap=True)
    return 0


def perf(options: argparse.Namespace, console: Console) -> int:
    """Time things side by side."""
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    modules = [importlib.import_module(PARTS[name]) for name in options.parts or PARTS]
    named = {key: getattr(options, key) for key in ("data", "data_dir", "out", "seed", "device")}
    given = {key: value for key, value in named.items() if value is not None}
    configs = [module.Config(**given, **parsed(module.Config, options.set)) for module in modules]
    for module, config in zip(modules, configs, strict=True):
        module.run(config)
    return 0
