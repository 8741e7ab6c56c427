"""The largest eigenvalue of the Hessian at a trained network: ours and other packages', and s.

All use the same parameters and data and, where they take one, the same tolerance: a residual of ``tol``
relative to the eigenvalue; for Σ twice that, since s is the root of its eigenvalue. The truth is
Lanczos at the precision of float32; residuals are computed afterwards with our operator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from torch import Tensor, nn

import stableopt
from benchmarks.framework.plotting import BLUE, panels
from benchmarks.perf.peers import PEERS
from benchmarks.perf.timing import Config, interleaved, report
from benchmarks.training.data import Dataset, Images
from benchmarks.training.loops import all_samples, gd_until, mean_squared_error, train
from benchmarks.training.networks import WIDTHS, fully_connected
from stableopt.curvature import Hessian, NonUniformity, Operator, Problem, top_eigenpair

__all__ = ["Config", "run", "trained"]

_STEPS_BETWEEN = 50
"""Steps of gradient descent between the measurement that a warm start comes from and this one."""


@dataclass(frozen=True)
class _Row:
    """The result of one way, and its cost."""

    matrix: str
    way: str
    seconds: float
    products: int | None
    value: float
    truth: float
    residual: float

    @property
    def error(self) -> float:
        """Relative to the truth, with its sign."""
        return self.value / self.truth - 1


def trained(config: Config, console: Console) -> tuple[nn.Module, nn.Module, Images]:
    """Train by gradient descent; return the network, itself some steps before, and the data."""
    images = Dataset(config.data, config.n).load(config.data_dir).to(config.device)
    model = fully_connected(WIDTHS[config.data], config.seed).to(config.device)
    optimizer = stableopt.GD(model.parameters(), lr=config.lr)
    with console.status("training"):
        gd_until(config.target_loss, model, images, optimizer, max_steps=200_000)
    before = copy.deepcopy(model)
    train(model, optimizer, all_samples(images), steps=_STEPS_BETWEEN)
    return before, model, images


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every way, print and write the table; return its rows."""
    console = console or Console()
    before, model, images = trained(config, console)
    data = (images.x, images.y)
    problem, former = (Problem(m, mean_squared_error, data) for m in (model, before))
    with console.status("comparing"):
        rows = _compared(config, problem, former, console)
    found = [{**asdict(row), "error": row.error} for row in rows]
    t = pd.DataFrame(found)
    columns = {key: t[key] for key in ("matrix", "way", "seconds", "products")}
    columns |= {"returned": t.value, "error": t.error, "residual": t.residual}
    title = (
        f"Largest eigenvalue to a residual of {config.tol:g}: {config.data},"
        f" d = {problem.num_params:,}, n = {config.n:,}"
    )
    report(config, console, "eigenvalues", title, columns, found)
    _draw(rows, config, config.out / "perf-eigenvalues.png")
    return found


def _compared(config: Config, problem: Problem, former: Problem, console: Console) -> list[_Row]:
    ways: dict[tuple[str, str], Callable[[], tuple[float, Tensor, int | None]]] = {}
    truths: dict[str, float] = {}
    operators: dict[str, Operator] = {}
    for matrix, kind, tol in (("H", Hessian, config.tol), ("Σ", NonUniformity, 2 * config.tol)):
        operators[matrix] = operator = kind(problem)
        truths[matrix] = top_eigenpair(operator, tol=3e-6, max_iter=2000).value
        start = top_eigenpair(kind(former), tol=tol, max_iter=1000, keep=True)
        ways[matrix, "stableopt, cold"] = _ours(kind, problem, tol, config.seed, None)
        ways[matrix, "stableopt, warm"] = _ours(kind, problem, tol, config.seed, start.subspace)
    for name, prepare in PEERS.items():
        try:
            ways["H", name] = prepare(problem, config.tol, config.seed)
        except ImportError as error:
            console.print(f"{name}: left out, {error}; pip install 'stableopt[bench-peers]'")
    timings = interleaved(
        {"/".join(key): way for key, way in ways.items()},
        repeats=config.repeats,
        device=config.device,
    )
    rows = []
    for (matrix, way), timing in zip(ways, timings.values(), strict=True):
        value, vector, products = timing.result
        image = operators[matrix] @ vector
        residual = float((image - value * vector).norm()) / abs(value)
        rows.append(_Row(matrix, way, timing.median, products, value, truths[matrix], residual))
    return rows


def _ours(
    kind: type[Hessian] | type[NonUniformity], problem: Problem, tol: float, seed: int, start: Any
) -> Callable[[], tuple[float, Tensor, int | None]]:
    def find() -> tuple[float, Tensor, int | None]:
        pair = top_eigenpair(kind(problem), start=start, tol=tol, max_iter=1000, seed=seed)
        return pair.value, pair.vector, pair.products

    return find


def _draw(rows: list[_Row], config: Config, path: Path) -> None:
    chosen = [row for row in rows if row.matrix == "H"]
    figure, (axes,) = panels(width=7, height=0.6 + 0.4 * len(chosen))
    reached = [row.residual <= 1.05 * config.tol for row in chosen]
    axes.barh(
        [row.way for row in chosen],
        [row.seconds for row in chosen],
        color=[BLUE if ok else "0.75" for ok in reached],
    )
    for place, (row, ok) in enumerate(zip(chosen, reached, strict=True)):
        note = f" error {abs(row.error):.1%}" + ("" if ok else f", residual {row.residual:.1%}")
        axes.annotate(note, (row.seconds, place), va="center", fontsize=8)
    axes.set_xlim(0, 1.5 * max(row.seconds for row in chosen))
    axes.invert_yaxis()
    axes.set(xlabel="seconds to the top eigenvalue (grey: not to the residual)")
    figure.savefig(path, dpi=150)
