"""The growth of a measurement's cost with samples, parameters and the batch of a training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import nn

from benchmarks.framework.plotting import coloured, finish, panels, trace
from benchmarks.perf.timing import Config, interleaved, random_data, report
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
    t = pd.DataFrame(rows)
    columns = {
        **{key: t[key] for key in ("series", "n", "d", "batch")},
        **{"Hv": 1e3 * t.hessian, "Σv": 1e3 * t.non_uniformity, "step": 1e3 * t.step},
        **{"Hv / step": t.hessian / t.step, "Σv / step": t.non_uniformity / t.step},
    }
    _draw(t, config.out)
    title = "Growth: milliseconds for one product, and for one training step"
    return report(config, console, "growth", title, columns, rows)


def _row(config: Config, n: int, width: int, batch: int) -> dict[str, Any]:
    x, y = random_data(config, n, (64,), 10)
    model = fully_connected((64, width, width, 10), config.seed).to(config.device)
    loss_fn = nn.MSELoss()
    problem = Problem(model, loss_fn, (x, y))
    hessian, sigma = Hessian(problem), NonUniformity(problem)
    vector = torch.randn(problem.num_params, device=config.device)
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


def _draw(table: pd.DataFrame, folder: Path) -> None:
    figure, axes = panels(len(SERIES), width=3, height=3)
    labels = {"hessian": "one Hv", "non_uniformity": "one Σv", "step": "one training step"}
    for index, (panel, series) in enumerate(zip(axes, SERIES, strict=True)):
        chosen = table[table.series == series]
        for (key, label), (_, colour) in zip(labels.items(), coloured(labels), strict=True):
            trace(panel, chosen[series], 1e3 * chosen[key], label, colour, marker="o")
        x = {"n": "samples n", "d": "parameters d"}.get(series, "batch of a step")
        finish(panel, x, "" if index else "milliseconds", log="xy", legend=not index)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "perf-growth.png", dpi=150)
