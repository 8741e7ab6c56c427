"""The command line: ``python -m stableopt doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from stableopt.doctor import diagnosis

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m stableopt")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what is there, what is missing, what a model would get"
    )
    doctor.add_argument("model", nargs="?", help="module:name of a model, or of what makes one")
    chosen = parser.parse_args(arguments)
    try:
        print(diagnosis(chosen.model))
    except Exception as error:  # of the user's module as well
        parser.error(f"{chosen.model}: {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
