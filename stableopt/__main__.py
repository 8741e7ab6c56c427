"""The command line: ``python -m stableopt doctor`` and ``python -m stableopt report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stableopt.doctor import diagnosis

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m stableopt")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="show what is installed, what is missing, and how a model is measured"
    )
    doctor.add_argument("model", nargs="?", help="module:name of a model or its factory")
    doctor.add_argument(
        "--optimizer",
        metavar="MODULE:CLASS",
        help="an optimizer class: whether its update rule is known, by which reader, with which limit",
    )
    report = commands.add_parser(
        "report", help="write the page of a run, finished, running or crashed"
    )
    report.add_argument(
        "path",
        metavar="FOLDER",
        help="the folder of the run, with the file of a JSONLinesSink or reports of a FlightRecorder",
    )
    report.add_argument("--out", metavar="FILE", help="the page; by default FOLDER/report.html")
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        from stableopt.report import read_run
        from stableopt.report.writer import write_run

        try:
            run = read_run(chosen.path)
            for text in run.skipped:
                print(f"skipped {text}", file=sys.stderr)
            written = str(write_run(run, chosen.path, chosen.out))
            encoding = sys.stdout.encoding or "utf-8"
            print(written.encode(encoding, "backslashreplace").decode(encoding))
        except (ImportError, OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    try:
        print(diagnosis(chosen.model, chosen.optimizer))
    except Exception as error:  # also from the user's module
        asked = " ".join(name for name in (chosen.model, chosen.optimizer) if name)
        parser.error(f"{asked}: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
