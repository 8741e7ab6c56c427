"""The command line: ``python -m benchmarks list | run | status | figures | report | perf | gpu``."""

from __future__ import annotations

import sys

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
