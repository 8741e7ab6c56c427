"""A hundred million parameters: what measuring takes, next to a training step of GPT-2 small.

The weights are random. This library and hessian-eigenthings run in one process each. Peak memory is that
of the process as Linux reports it, including the model, AdamW's state and Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.console import Console

from benchmarks.perf.large.phases import Config
from benchmarks.perf.timing import report

__all__ = ["Config", "run"]

_EAGER_RETURN = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Freed tensors are returned to the system at once, so that peaks count live tensors only."""


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Run both packages, print and write their table; return its rows."""
    console = console or Console()
    with console.status("training and measuring"):
        rows = _in_process("ours", config)
    [products] = [row["products"] for row in rows if row["phase"] == "sharpness"]
    with console.status("hessian-eigenthings, as many products"):
        rows += _in_process("theirs", config, products)
    t = pd.DataFrame(rows)
    columns = {
        "phase": t.phase,
        "products": t.products,
        "CPU s": t.cpu_seconds.round(1),
        "peak GiB": t.peak_gib.round(2),
        "value": t.value,
        "residual": t.residual.round(4),
    }
    title = f"{rows[0]['parameters']:,} parameters, {config.samples} x {config.tokens} tokens"
    return report(config, console, "large", title, columns, rows)


def _in_process(package: str, config: Config, *numbers: int) -> list[dict[str, Any]]:
    """Return the rows of ``package``, run in a new process."""
    given = json.dumps([{**asdict(config), "out": str(config.out), "data_dir": None}, *numbers])
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.perf.large.phases", package, given],
        capture_output=True,
        text=True,
        env={**os.environ, **_EAGER_RETURN},
        check=False,
    )
    if process.returncode:
        if "No module named" in process.stderr and package == "theirs":
            return []
        raise RuntimeError(process.stderr)
    rows: list[dict[str, Any]] = json.loads(process.stdout.splitlines()[-1])
    return rows
