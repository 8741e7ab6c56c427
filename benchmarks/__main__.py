"""``python -m benchmarks list | run NAME | perf [PART ...]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from benchmarks.perf import PARTS

EXPERIMENTS = {
    "control-laws": "benchmarks.control_laws",
    "escape": "benchmarks.escape",
    "gd-sharpness": "benchmarks.gd_sharpness",
    "quasi-newton": "benchmarks.quasi_newton",
    "steering": "benchmarks.steering",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the experiments")
    runner = commands.add_parser("run", help="run an experiment")
    runner.add_argument("name", choices=EXPERIMENTS)
    timer = commands.add_parser("perf", help="time this library and others, side by side")
    timer.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    timer.add_argument("--device", help="cpu or cuda")
    for command in (runner, timer):
        command.add_argument("--data", help="digits (embedded) or fashion-mnist")
        command.add_argument("--data-dir", type=Path, help="where the data are, or are to be kept")
        command.add_argument("--out", type=Path, help="folder for logs, numbers and figures")
        command.add_argument("--seed", type=int)
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="any other field of the Config; several values with commas",
        )
    options = parser.parse_args(arguments)
    if options.command == "list":
        for name, module in {**EXPERIMENTS, **PARTS}.items():
            print(f"{name:<14}{importlib.import_module(module).__doc__.splitlines()[0]}")
        return 0
    if options.command == "perf":
        unknown = set(options.parts) - set(PARTS)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
        chosen = [importlib.import_module(PARTS[name]) for name in options.parts or PARTS]
    else:
        chosen = [importlib.import_module(EXPERIMENTS[options.name])]
    try:
        configs = [configure(module.Config, options) for module in chosen]
    except ValueError as error:
        parser.error(str(error))
    for module, config in zip(chosen, configs, strict=True):
        module.run(config)
    return 0


def configure(kind: type[Any], options: argparse.Namespace) -> Any:
    """Return a ``kind`` with what the options set.

    Raises:
        ValueError: for a key that it does not have, or a value that does not fit.
    """
    named = ("data", "data_dir", "out", "seed", "device")
    given = {key: getattr(options, key, None) for key in named}
    values = {key: value for key, value in given.items() if value is not None}
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
