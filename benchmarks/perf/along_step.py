"""The cost of margins along the step, in training steps and forward passes of the same run.

Steps with and without a monitor alternate, on copies of one run with full batches; the ratio of the
medians is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pandas as pd
import torch
from rich.console import Console

import stableopt
from benchmarks.perf.timing import Config, interleaved, random_data, report
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.networks import fully_connected

__all__ = ["Config", "run"]

_WIDTH = 512
"""Of the hidden layers: steps long enough that passes count, and not the fixed cost of a measurement."""

_STEPS = 8
"""The most steps in a segment: all of it ends within a minute of one idle core."""

_QUANTITIES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "realised edge": ("realised_edge",),
    "critical sharpness": ("critical_sharpness",),
    "both": ("realised_edge", "critical_sharpness"),
}


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time steps with each set of quantities, print and write their table; return its rows."""
    console = console or Console()
    x, y = random_data(config, config.n, (64,), 10)
    count = min(_STEPS, config.segment_steps)
    monitors: dict[str, stableopt.StabilityMonitor] = {}

    def steps(name: str) -> Callable[[], None]:
        torch.manual_seed(config.seed)
        model = fully_connected((64, _WIDTH, _WIDTH, 10), config.seed).to(config.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step() -> None:
            for _ in range(count):
                optimizer.zero_grad()
                mean_squared_error(model(x), y).backward()
                optimizer.step()

        if _QUANTITIES[name]:
            step()  # so that what is set up on first use does not count
            data = (x, y)
            monitors[name] = stableopt.StabilityMonitor(
                optimizer,
                model,
                mean_squared_error,
                data,
                every=1,
                quantities=_QUANTITIES[name],
                batch_size=len(x),
            )
        return step

    functions = {name: steps(name) for name in _QUANTITIES}
    with console.status("stepping with and without margins along the step"):
        found = interleaved(functions, repeats=config.segments, device=config.device)
    each = {name: timing.median / count for name, timing in found.items()}
    rows = [
        {
            "quantities": name,
            "step_ms": 1e3 * each[name],
            "training_steps": each[name] / each["plain"] - 1,
            "passes": _passes(monitors.get(name)),
        }
        for name in _QUANTITIES
    ]
    t = pd.DataFrame(rows)
    columns = {
        "measured at every step": t.quantities,
        "ms a step": t.step_ms,
        "cost in training steps": t.training_steps,
        "forward passes of the search": t.passes,
    }
    title = f"Cost of margins along the step: width {_WIDTH}, n = {len(x):,}"
    return report(config, console, "along-step", title, columns, rows)


def _passes(monitor: stableopt.StabilityMonitor | None) -> float:
    """Return the median number of losses along the step, not a number where none is taken."""
    history = [] if monitor is None else list(monitor.history)
    counts = [m["critical_sharpness"].details.get("passes") for m in history]
    known = [count for count in counts if count is not None]
    return median(known) if known else float("nan")
