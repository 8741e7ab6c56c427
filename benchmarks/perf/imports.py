"""How long ``import stableopt`` takes, relative to ``import torch``, which every user pays for.

Fresh processes alternate, so that drifts in the machine's speed affect both alike. The result is the
ratio of the medians.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks.perf.timing import Config, report

__all__ = ["Config", "run", "seconds_of"]

MODULES = ("torch", "stableopt")


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time the imports in fresh processes, print and write their table; return its rows."""
    console = console or Console()
    with console.status("imports"):
        for module in MODULES:  # fills __pycache__ and the disk's cache
            seconds_of(module)
        turns = [[seconds_of(module) for module in MODULES] for _ in range(3 * config.repeats)]
    torch_seconds = median(turn[0] for turn in turns)
    rows = [
        {"module": module, "seconds": median(times), "of_torch": median(times) / torch_seconds}
        for module, times in zip(MODULES, zip(*turns, strict=True), strict=True)
    ]
    rows[1]["of_torch_in_turns"] = [seconds / torch_import for torch_import, seconds in turns]
    t = pd.DataFrame(rows)
    columns = {"module": t.module, "seconds": t.seconds, "relative to torch": t.of_torch}
    title = f"Imports, median of {len(turns)} processes"
    return report(config, console, "imports", title, columns, rows)


def seconds_of(module: str) -> float:
    """Return the seconds that the import of ``module`` takes in a fresh process."""
    code = f"import time; began = time.perf_counter(); import {module};"
    code += " print(time.perf_counter() - began)"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(process.stdout)
