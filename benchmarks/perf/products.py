"""Products with the covariance of per-sample Hessians: the structured way against the others.

The unit is the time of one gradient over the same samples, measured in alternation. Methods that process
samples one by one cost the same for each, so they are timed on a few samples, given in the results, and
scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.framework.plotting import coloured, finish, panels, trace
from benchmarks.perf.timing import Config, interleaved, random_data, report
from benchmarks.training.networks import WIDTHS, TransformerBlock, fully_connected, small_vgg
from stableopt.curvature import Hessian, NonUniformity, Problem

__all__ = ["Config", "cases", "run"]

_FEW = 50
"""Number of samples on which the unstructured methods are timed."""


def cases(seed: int) -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Return networks by name, each with the shape of an input and the number of outputs."""
    return {
        "FNN": (fully_connected(WIDTHS["fashion-mnist"], seed), (784,), 10),
        "VGG": (small_vgg(seed), (3, 32, 32), 2),
        "transformer": (TransformerBlock(64, seed=seed), (16, 64), 10),
    }


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every method on every network and size, print and write the table; return its rows."""
    console = console or Console()
    rows = []
    for name, (model, shape, outputs) in cases(config.seed).items():
        model.to(config.device)
        for n in config.sizes:
            with console.status(f"{name}, n = {n:,}"):
                rows.append({"network": name, "n": n, **_row(config, model, shape, outputs, n)})

    t = pd.DataFrame(rows)
    methods = {"Hv": "hessian", "structured": "structured", "vmap": "vmap", "loop": "loop"}
    columns = {
        **{"network": t.network, "d": t.d, "n": t.n, "gradient, ms": 1e3 * t.gradient},
        **{name: t[column] / t.gradient for name, column in methods.items()},
        "loop / ours": t.loop / t.structured,
    }
    _draw(t, config.out)
    title = "One product with the covariance of per-sample Hessians, in gradients"
    return report(config, console, "products", title, columns, rows)


def _row(
    config: Config, model: nn.Module, shape: tuple[int, ...], outputs: int, n: int
) -> dict[str, Any]:
    x, y = random_data(config, n, shape, outputs)
    loss_fn, few = nn.MSELoss(), min(_FEW, n)
    problem = Problem(model, loss_fn, (x, y))
    few_problem = Problem(model, loss_fn, (x[:few], y[:few]))
    vector = torch.randn(problem.num_params, device=config.device)
    structured, hessian = NonUniformity(problem, method="structured"), Hessian(problem)
    unstructured = {
        method: NonUniformity(few_problem, method=method)  # type: ignore[arg-type]
        for method in ("vmap", "loop")
    }

    def gradient() -> None:
        model.zero_grad()
        for start in range(0, n, 1000):
            rows = slice(start, start + 1000)
            loss_fn(model(x[rows]), y[rows]).backward()

    def product(operator: Any) -> Callable[[], Tensor]:
        return lambda: operator @ vector

    timings = interleaved(
        {
            "gradient": gradient,
            "hessian": product(hessian),
            "structured": product(structured),
            **{method: product(operator) for method, operator in unstructured.items()},
        },
        repeats=config.repeats,
        device=config.device,
    )
    medians = {name: timing.median for name, timing in timings.items()}
    for method in unstructured:
        medians[method] *= n / few
    # The methods differ on the same few samples by rounding, and at ReLU's kinks.
    loop_product = unstructured["loop"] @ vector
    structured_product = NonUniformity(few_problem, method="structured") @ vector
    difference = float((structured_product - loop_product).norm() / loop_product.norm())
    return {"d": problem.num_params, "few": few, **medians, "difference": difference}


def _draw(table: pd.DataFrame, folder: Path) -> None:
    names = list(dict.fromkeys(table.network))
    figure, axes = panels(len(names), width=3.2, height=3)
    labels = {
        "loop": "loop",
        "vmap": "vmap",
        "structured": "structured (ours)",
        "hessian": "one Hv",
    }
    for index, (panel, name) in enumerate(zip(axes, names, strict=True)):
        group = table[table.network == name]
        for (column, label), (_, colour) in zip(labels.items(), coloured(labels), strict=True):
            trace(panel, group.n, group[column] / group.gradient, label, colour, marker="o")
        title, y = f"{name}, d = {group.d.iloc[0]:,}", "cost of a product, in gradients"
        y = "" if index else y
        finish(panel, "samples n", y, log="xy", title=title, legend=not index)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "perf-products.png", dpi=150)
