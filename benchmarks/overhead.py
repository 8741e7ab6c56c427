"""What tracking costs: training time with and without, side by side in one process.

Segments of training with tracking and without alternate, on two copies of the same run, so that a
machine whose speed drifts slows both alike; the ratio of the medians is what counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stableopt
from benchmarks.data import Images, load
from benchmarks.networks import WIDTHS, fully_connected
from benchmarks.training import mean_squared_error

__all__ = ["Config", "run"]


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        data: ``"digits"`` or ``"fashion-mnist"``.
        data_dir: where the data are; see :func:`benchmarks.data.load`.
        out: the folder for the numbers.
        seed: of the initialisation.
        n: training images, which are the probe set too.
        lr: learning rate of GD.
        every: steps between measurements.
        max_overhead: share of the training time, for the second comparison.
        segments: pairs of segments.
        segment_steps: steps in each.
        warm_up: steps before, untimed: past the noisy start, on the way to the edge of stability.
    """

    data: str = "fashion-mnist"
    data_dir: Path | None = None
    out: Path = Path("runs/overhead")
    seed: int = 0
    n: int = 1000
    lr: float = 0.5
    every: int = 50
    max_overhead: float = 0.05
    segments: int = 7
    segment_steps: int = 100
    warm_up: int = 200


def run(config: Config, console: Console | None = None) -> list[dict[str, object]]:
    """Run both comparisons, print their table, write ``overhead.json``; return its rows."""
    console = console or Console()
    images = load(config.data, n=config.n, folder=config.data_dir)
    rows = []
    for name, pace in (
        (f"every={config.every}", {"every": config.every}),
        (f"max_overhead={config.max_overhead:g}", {"max_overhead": config.max_overhead}),
    ):
        with console.status(f"tracking with {name}"):
            rows.append({"tracking": name, **_compare(config, images, pace)})
    table = Table(title=f"Cost of tracking sharpness by GD: {config.data}, n = {config.n:,}")
    for heading in ("tracking", "ms a step", "with tracking", "overhead", "measured", "products"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["tracking"],
            f"{row['plain_ms']:.2f}",
            f"{row['tracked_ms']:.2f}",
            f"{row['overhead']:+.1%}",
            f"{row['measurements']} times",
            f"{row['median_products']:g} each",
        )
    console.print(table)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "overhead.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def _compare(config: Config, images: Images, pace: dict[str, float]) -> dict[str, object]:
    def prepared() -> tuple[nn.Module, stableopt.GD, Callable[[int], float]]:
        model = fully_connected(WIDTHS[config.data], config.seed)
        optimizer = stableopt.GD(model.parameters(), lr=config.lr)

        def train(steps: int) -> float:
            began = time.perf_counter()
            for _ in range(steps):
                optimizer.zero_grad()
                mean_squared_error(model(images.x), images.y).backward()
                optimizer.step()
            return time.perf_counter() - began

        train(config.warm_up)
        return model, optimizer, train

    _, _, plain = prepared()
    model, optimizer, tracked = prepared()
    monitor = optimizer.track(model, mean_squared_error, (images.x, images.y), **pace)
    tracked(config.segment_steps)  # the first measurement starts cold
    first = len(monitor.history)
    times = [
        (plain(config.segment_steps), tracked(config.segment_steps)) for _ in range(config.segments)
    ]
    measured = list(monitor.history)[first:]
    monitor.close()
    plain_s, tracked_s = median(t[0] for t in times), median(t[1] for t in times)
    return {
        "plain_ms": 1e3 * plain_s / config.segment_steps,
        "tracked_ms": 1e3 * tracked_s / config.segment_steps,
        "overhead": tracked_s / plain_s - 1,
        "overhead_of_pairs": [t / p - 1 for p, t in times],
        "measurements": len(measured),
        "median_products": median(m.measurements["sharpness"].products for m in measured)
        if measured
        else None,
        "not_converged": sum(not m.converged for m in measured),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
