"""The cost of tracking: training time with and without it, alternating in one process.

Segments of training with and without tracking alternate, on two copies of the same run, so that drifts
in the machine's speed affect both alike. The result is the ratio of the medians.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import pandas as pd
from rich.console import Console

import stableopt
from benchmarks.perf.timing import Config, once, report
from benchmarks.training.data import Dataset, Images
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.networks import WIDTHS, fully_connected

__all__ = ["Config", "run"]


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Run both comparisons, print and write their table; return its rows."""
    console = console or Console()
    images = Dataset(config.data, config.n).load(config.data_dir).to(config.device)
    rows = []
    for name, compare in (
        (f"every={config.every}", _every),
        ("max_overhead", _max_overhead),
    ):
        with console.status(f"tracking with {name}"):
            rows.append(compare(config, images))
    t = pd.DataFrame(rows)
    columns = {
        **{"tracking": t.tracking, "ms a step": t.plain_ms, "ms with tracking": t.tracked_ms},
        **{"overhead, %": 100 * t.overhead, "measurements": t.measurements},
        "products each": t.median_products,
    }
    title = f"Cost of tracking sharpness by GD: {config.data}, n = {config.n:,}"
    return report(config, console, "tracking", title, columns, rows)


class _Run:
    """A run of GD that continues step by step."""

    def __init__(self, config: Config, images: Images) -> None:
        self.images, self.device, self._clock = images, config.device, config.clock
        self.model = fully_connected(WIDTHS[config.data], config.seed).to(config.device)
        self.optimizer = stableopt.GD(self.model.parameters(), lr=config.lr)
        self.seconds(config.warm_up)

    def track(self, **pace: float) -> stableopt.StabilityMonitor:
        data = (self.images.x, self.images.y)
        return self.optimizer.track(self.model, mean_squared_error, data, **pace)

    def seconds(self, steps: int) -> list[float]:
        """Take steps; return the time of each."""

        def step() -> None:
            self.optimizer.zero_grad()
            mean_squared_error(self.model(self.images.x), self.images.y).backward()
            self.optimizer.step()

        return [once(step, self.device, self._clock).median for _ in range(steps)]


def _every(config: Config, images: Images) -> dict[str, Any]:
    """Alternate segments with and without tracking; compare the medians."""
    plain, tracked = _Run(config, images), _Run(config, images)
    monitor = tracked.track(every=config.every)
    steps = config.segment_steps
    tracked.seconds(steps)  # the first measurement has no warm start
    first = len(monitor.history)
    pairs = [
        (sum(plain.seconds(steps)), sum(tracked.seconds(steps))) for _ in range(config.segments)
    ]
    without, with_ = (median(times) / steps for times in zip(*pairs, strict=True))
    row = _row(f"every={config.every}", without, with_, list(monitor.history)[first:])
    return {**row, "overhead_of_pairs": [t / p - 1 for p, t in pairs]}


def _max_overhead(config: Config, images: Images) -> dict[str, Any]:
    """Compare the mean step of one run with its median step without a measurement.

    The monitor measures elapsed time, which would include segments of a second, alternating run.
    """
    run = _Run(config, images)
    monitor = run.track(max_overhead=config.max_overhead)
    # Each counted measurement comes with the steps up to the next one, which pay for it. The first
    # measurement is not counted: no steps have paid for it.
    run.seconds(1)
    times: list[float] = []
    unmeasured: list[float] = []
    counted = 0
    pending: list[float] = []
    while len(times) < config.segments * config.segment_steps:
        before = len(monitor.history)
        pending += run.seconds(1)
        if len(monitor.history) == before:
            unmeasured.append(pending[-1])
            continue
        if before > 1:
            times += pending[:-1]
            counted += 1
        pending = pending[-1:]
    history = list(monitor.history)[1 : 1 + counted]
    row = _row(
        f"max_overhead={config.max_overhead:g}",
        median(unmeasured),
        sum(times) / len(times),
        history,
    )
    return {**row, "accounted": monitor.overhead}


def _row(
    tracking: str, without: float, with_: float, history: list[stableopt.StabilityMargins]
) -> dict[str, Any]:
    return {
        "tracking": tracking,
        "plain_ms": 1e3 * without,
        "tracked_ms": 1e3 * with_,
        "overhead": with_ / without - 1,
        "measurements": len(history),
        "median_products": median(m.measurements["sharpness"].products for m in history),
        "not_converged": sum(not m.converged for m in history),
    }
