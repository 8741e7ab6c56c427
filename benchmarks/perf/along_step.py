"""The cost of margins along the step, in training steps and forward passes of the same run.

Segments of steps with and without a monitor alternate, on copies of one run with full batches. The
result is the ratio of the medians.
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
"""Width of the hidden layers: passes should outweigh the fixed cost of a measurement."""

_STEPS = 8
"""Largest number of steps in a segment, so that the part takes a minute on one idle core."""

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
    steps_per_segment = min(_STEPS, config.segment_steps)
    monitors: dict[str, stableopt.StabilityMonitor] = {}

    def segment(name: str) -> Callable[[], None]:
        torch.manual_seed(config.seed)
        model = fully_connected((64, _WIDTH, _WIDTH, 10), config.seed).to(config.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step() -> None:
            for _ in range(steps_per_segment):
                optimizer.zero_grad()
                mean_squared_error(model(x), y).backward()
                optimizer.step()

        if _QUANTITIES[name]:
            step()  # warm-up
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

    functions = {name: segment(name) for name in _QUANTITIES}
    with console.status("stepping with and without margins along the step"):
        timings = interleaved(functions, repeats=config.segments, device=config.device)
    step_seconds = {name: timing.median / steps_per_segment for name, timing in timings.items()}
    rows = [
        {
            "quantities": name,
            "step_ms": 1e3 * step_seconds[name],
            "training_steps": step_seconds[name] / step_seconds["plain"] - 1,
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
    """Return the median number of forward passes of a search, NaN without a search."""
    history = [] if monitor is None else list(monitor.history)
    counts = [m["critical_sharpness"].details.get("passes") for m in history]
    passes = [count for count in counts if count is not None]
    return median(passes) if passes else float("nan")
