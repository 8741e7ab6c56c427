"""``python -m benchmarks list | run NAME | status | figures | report | perf [PART ...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import cli as commands
from benchmarks.experiments import NAMES
from benchmarks.framework.experiment import PRESETS
from benchmarks.perf import PARTS

RUNS = Path("runs")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options, Console())
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)

    listing = subparsers.add_parser("list", help="name the experiments")
    listing.set_defaults(run=commands.list_all)

    run = subparsers.add_parser("run", help="run experiments, or go on with them")
    run.add_argument("names", nargs="+", metavar="NAME", choices=[*NAMES, "all"], help="or 'all'")
    run.add_argument("--preset", choices=PRESETS, default="small")
    run.add_argument("--seeds", metavar="0,1,2", help="instead of the preset's")
    run.add_argument("-j", "--workers", type=int, default=1, metavar="N", help="jobs at a time")
    run.add_argument("--executor", default="processes", help="or dask:ADDRESS, slurm:FOLDER")
    run.add_argument("--shard", metavar="I/N", help="the I-th of N parts of the jobs")
    run.add_argument("--ensemble", type=int, default=0, metavar="N", help="train up to N as one")
    run.add_argument("--retry", action="store_true", help="run again what has failed")
    run.add_argument("--dry-run", action="store_true", help="say what would be run")
    run.set_defaults(run=commands.run)

    status = subparsers.add_parser("status", help="say what is done, runs, has failed")
    status.set_defaults(run=commands.status)

    figures = subparsers.add_parser("figures", help="draw what there is; trains nothing")
    figures.add_argument("names", nargs="*", metavar="NAME", help="all by default")
    figures.add_argument("--into", type=Path, metavar="DIR", help="instead of the runs' folder")
    figures.set_defaults(run=commands.figures)

    report = subparsers.add_parser("report", help="set what came out beside what is printed")
    report.add_argument("--results", type=Path, default=RESULTS, help="what figures wrote")
    report.add_argument("--to", type=Path, help="file; REPORT.md beside the results by default")
    report.set_defaults(run=commands.report)

    perf = subparsers.add_parser("perf", help="time this library and others, side by side")
    perf.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    perf.add_argument("--seed", type=int)
    perf.set_defaults(run=commands.perf)

    for command in (run, perf):
        command.add_argument("--data", help="digits (embedded), fashion-mnist, cifar10-2, cifar10")
        command.add_argument("--data-dir", type=Path, help="where the data are, or are to be kept")
        command.add_argument("--device", help="cpu or cuda")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE,…",
            help="any other setting; several values with commas",
        )
    for command in (run, status, figures):
        command.add_argument("--out", type=Path, default=RUNS, help="folder for everything")
    perf.add_argument("--out", type=Path, help="folder for numbers and figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
