"""Products with the covariance of per-sample Hessians: the structured way beside the others.

The unit is one gradient over the same samples, timed in the same turns. Ways that take samples by
themselves cost the same for each sample, so they are timed on the first few and scaled; the table
says on how many.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.perf.timing import Config, interleaved, write
from benchmarks.training.networks import WIDTHS, TransformerBlock, fully_connected, small_vgg
from stableopt.curvature import Hessian, NonUniformity, Problem

__all__ = ["Config", "cases", "run"]

_FEW = 50
"""Samples on which ways that cost the same for each are timed."""


def cases(seed: int) -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Return, by name, a network, the shape of one input, and the number of outputs."""
    return {
        "FNN": (fully_connected(WIDTHS["fashion-mnist"], seed), (784,), 10),
        "VGG": (small_vgg(seed), (3, 32, 32), 2),
        "transformer": (TransformerBlock(64, seed=seed), (16, 64), 10),
    }


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every way on every network and size, print and write the table; return its rows."""
    console = console or Console()
    rows = []
    for name, (model, shape, outputs) in cases(config.seed).items():
        model.to(config.device)
        for n in config.sizes:
            with console.status(f"{name}, n = {n:,}"):
                rows.append({"network": name, "n": n, **_row(config, model, shape, outputs, n)})
    table = Table(title="One product with the covariance of per-sample Hessians, in gradients")
    headings = ("network", "d", "n", "gradient", "Hv", "structured", "vmap", "loop", "loop / ours")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        unit = row["gradient"]
        table.add_row(
            row["network"],
            f"{row['d']:,}",
            f"{row['n']:,}",
            f"{1e3 * unit:.1f} ms",
            *(f"{row[way] / unit:.1f}" for way in ("hessian", "structured", "vmap", "loop")),
            f"{row['loop'] / row['structured']:.0f}",
        )
    console.print(table)
    write(config.out / "perf-products.json", rows, config.device)
    _draw(rows, config.out / "perf-products.png")
    return rows


def _row(
    config: Config, model: nn.Module, shape: tuple[int, ...], outputs: int, n: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.rand((n, *shape), generator=generator).to(config.device)
    y = torch.rand((n, outputs), generator=generator).to(config.device)
    loss_fn, few = nn.MSELoss(), min(_FEW, n)
    problem = Problem(model, loss_fn, (x, y))
    part = Problem(model, loss_fn, (x[:few], y[:few]))
    vector = torch.randn(problem.num_params, generator=generator).to(config.device)
    structured, hessian = NonUniformity(problem, method="structured"), Hessian(problem)
    ways = {
        way: NonUniformity(part, method=way)  # type: ignore[arg-type]
        for way in ("vmap", "loop")
    }

    def gradient() -> None:
        model.zero_grad()
        for start in range(0, n, 1000):
            rows = slice(start, start + 1000)
            loss_fn(model(x[rows]), y[rows]).backward()

    def times(operator: Any) -> Callable[[], Tensor]:
        return lambda: operator @ vector

    timings = interleaved(
        {
            "gradient": gradient,
            "hessian": times(hessian),
            "structured": times(structured),
            **{way: times(operator) for way, operator in ways.items()},
        },
        repeats=config.repeats,
        device=config.device,
    )
    medians = {name: timing.median for name, timing in timings.items()}
    for way in ways:
        medians[way] *= n / few
    # On the same few samples, how far the ways are apart: ReLU's kinks, and rounding.
    expected = ways["loop"] @ vector
    own = NonUniformity(part, method="structured") @ vector
    difference = float((own - expected).norm() / expected.norm())
    return {"d": problem.num_params, "few": few, **medians, "difference": difference}


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        chosen = [row for row in rows if row["network"] == name]
        for way in ("loop", "vmap", "structured", "hessian"):
            costs = [row[way] / row["gradient"] for row in chosen]
            label = {"hessian": "one Hv", "structured": "structured (ours)"}.get(way, way)
            axes.loglog([row["n"] for row in chosen], costs, "o-", label=label)
        axes.set(title=f"{name}, d = {chosen[0]['d']:,}", xlabel="samples n")
    figure.axes[0].set_ylabel("cost of a product, in gradients")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
