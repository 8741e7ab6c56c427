"""How the cost of a measurement grows with samples, parameters and the batch of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.perf.timing import Config, interleaved, write
from benchmarks.training.networks import fully_connected
from stableopt.curvature import Hessian, NonUniformity, Problem

__all__ = ["Config", "run"]

SERIES: dict[str, list[tuple[int, int, int]]] = {
    # (samples n, width of the two hidden layers, batch of a training step)
    "n": [(n, 256, 64) for n in (125, 250, 500, 1000, 2000, 4000)],
    "d": [(500, width, 64) for width in (32, 64, 128, 256, 512, 1024)],
    "batch": [(1000, 256, batch) for batch in (8, 32, 128, 512, 1000)],
}


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time one product of each kind and one training step along each series; return the rows."""
    console = console or Console()
    rows = []
    for series, points in SERIES.items():
        with console.status(f"growth with {series}"):
            rows += [{"series": series, **_row(config, *point)} for point in points]
    table = Table(title="Growth: milliseconds for one product, and for one training step")
    for heading in ("series", "n", "d", "batch", "Hv", "Σv", "step", "Hv / step", "Σv / step"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["series"],
            *(f"{row[key]:,}" for key in ("n", "d", "batch")),
            *(f"{1e3 * row[key]:.2f}" for key in ("hessian", "non_uniformity", "step")),
            *(f"{row[key] / row['step']:.1f}" for key in ("hessian", "non_uniformity")),
        )
    console.print(table)
    write(config.out / "perf-growth.json", rows, config.device)
    _draw(rows, config.out / "perf-growth.png")
    return rows


def _row(config: Config, n: int, width: int, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.rand((n, 64), generator=generator).to(config.device)
    y = torch.rand((n, 10), generator=generator).to(config.device)
    model = fully_connected((64, width, width, 10), config.seed).to(config.device)
    loss_fn = nn.MSELoss()
    problem = Problem(model, loss_fn, (x, y))
    hessian, sigma = Hessian(problem), NonUniformity(problem)
    vector = torch.randn(problem.num_params, generator=generator).to(config.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x[:batch]), y[:batch]).backward()
        optimizer.step()

    timings = interleaved(
        {
            "hessian": lambda: hessian @ vector,
            "non_uniformity": lambda: sigma @ vector,
            "step": step,
        },
        repeats=4 * config.repeats,
        device=config.device,
    )
    medians = {name: timing.median for name, timing in timings.items()}
    return {"n": n, "d": problem.num_params, "batch": batch, **medians}


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(9, 3), layout="constrained")
    labels = {"hessian": "one Hv", "non_uniformity": "one Σv", "step": "one training step"}
    for axes, series in zip(figure.subplots(1, len(SERIES), squeeze=False)[0], SERIES, strict=True):
        chosen = [row for row in rows if row["series"] == series]
        for key, label in labels.items():
            axes.loglog(
                [row[series] for row in chosen],
                [1e3 * row[key] for row in chosen],
                "o-",
                label=label,
            )
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel={"n": "samples n", "d": "parameters d"}.get(series, "batch of a step"))
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
