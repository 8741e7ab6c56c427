"""``python -m benchmarks list | run NAME``."""

from __future__ import annotations

import argparse
import importlib
import sys
import typing
from pathlib import Path
from types import UnionType
from typing import Any

EXPERIMENTS = {
    "control-laws": "benchmarks.control_laws",
    "escape": "benchmarks.escape",
    "gd-sharpness": "benchmarks.gd_sharpness",
    "overhead": "benchmarks.overhead",
    "steering": "benchmarks.steering",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the experiments")
    runner = commands.add_parser("run", help="run an experiment")
    runner.add_argument("name", choices=EXPERIMENTS)
    runner.add_argument("--data", help="digits (embedded) or fashion-mnist")
    runner.add_argument("--data-dir", type=Path, help="where the data are, or are to be kept")
    runner.add_argument("--out", type=Path, help="folder for logs, numbers and figures")
    runner.add_argument("--seed", type=int)
    runner.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other field of the experiment's Config; several values with commas",
    )
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, module in EXPERIMENTS.items():
            print(f"{name:<14}{importlib.import_module(module).__doc__.splitlines()[0]}")
        return 0
    experiment = importlib.import_module(EXPERIMENTS[options.name])
    try:
        config = configure(experiment.Config, options)
    except ValueError as error:
        parser.error(str(error))
    experiment.run(config)
    return 0


def configure(kind: type[Any], options: argparse.Namespace) -> Any:
    """Return a ``kind`` with what the options set.

    Raises:
        ValueError: for a key that it does not have, or a value that does not fit.
    """
    named = ("data", "data_dir", "out", "seed")
    values = {key: getattr(options, key) for key in named if getattr(options, key) is not None}
    types = typing.get_type_hints(kind)
    for setting in options.set:
        key, equals, text = setting.partition("=")
        if not equals or key not in types:
            raise ValueError(f"--set {setting}: expected one of {', '.join(types)}, and =VALUE")
        values[key] = _parse(text, types[key], setting)
    return kind(**values)


def _parse(text: str, kind: Any, setting: str) -> Any:
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(part, typing.get_args(kind)[0], setting) for part in text.split(","))
    if typing.get_origin(kind) in (UnionType, typing.Union):
        kind = typing.get_args(kind)[0]
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--set {setting}: expected {kind.__name__}") from None


if __name__ == "__main__":
    sys.exit(main())
