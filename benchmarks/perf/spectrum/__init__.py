"""Top 10 eigenvalues, the trace and the spectral density of the Hessian: ours and other packages'.

All use the same trained network and data, and reach the same error against a converged reference: each
takes the first setting of its ladder that does, so that all are compared at their best. Errors are those
of the worst of ten eigenvalues, of a trace as root mean square over seeds, and Kolmogorov's distance of
the distributions up to a hundredth of their range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from torch import Tensor

from benchmarks.perf import timing
from benchmarks.perf.eigenvalues import trained
from benchmarks.perf.spectrum.peers import STARTS, TOLS, Way, peers
from benchmarks.perf.timing import interleaved, report
from stableopt.curvature import Hessian, Problem, spectral_density, top_eigenpairs, trace

__all__ = ["Config", "run"]

COUNT = 10
"""Eigenvalues."""

_REFERENCE = (4, 80)
"""Starts and steps of the converged density."""


@dataclass(frozen=True)
class Config(timing.Config):
    """What is compared, in addition to the settings of all timings.

    Attributes:
        value_error: largest relative error of each of ten eigenvalues.
        trace_error: relative error of the trace, root mean square over seeds.
        density_error: Kolmogorov's distance of the densities.
        seeds: of traces and densities, one run each.
    """

    value_error: float = 1e-4
    trace_error: float = 0.01
    density_error: float = 0.02
    seeds: int = 3


@dataclass(frozen=True)
class _Task:
    name: str
    target: float
    seeds: int
    error: Callable[[Sequence[Any]], float]
    ways: dict[str, tuple[Sequence[Any], Way]]


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every way at the required error, print and write the table; return its rows."""
    console = console or Console()
    found = trained(config, console)
    problem = Problem(found.model, found.loss_fn, found.data)
    rows: list[dict[str, Any]] = []
    for task in _tasks(config, problem, console):
        rows += _compared(task, config)
        console.print(f"{task.name}: compared")
    t = pd.DataFrame(rows)
    title = f"Spectrum: {config.data}, d = {problem.num_params:,}, n = {config.n:,}"
    return report(config, console, "spectrum", title, {key: t[key] for key in t}, rows)


def _compared(task: _Task, config: Config) -> list[dict[str, Any]]:
    chosen: dict[str, tuple[Any, float, Way]] = {}
    for name, (settings, way) in task.ways.items():
        for setting in settings:
            error = task.error([way(setting, seed)[0] for seed in range(task.seeds)])
            if error <= task.target:
                break
        chosen[name] = setting, error, way
    timings = interleaved(
        {
            name: lambda s=setting, w=way: [w(s, seed) for seed in range(task.seeds)]  # type: ignore[misc]
            for name, (setting, _, way) in chosen.items()
        },
        repeats=config.repeats,
        device=config.device,
        clock=config.clock,
    )
    return [
        {
            "task": task.name,
            "way": name,
            "setting": str(chosen[name][0]),
            "seconds": found.median / task.seeds,
            "products": sum(products for _, products in found.result) / task.seeds,
            "error": chosen[name][1],
            "reached": chosen[name][1] <= task.target,
        }
        for name, found in timings.items()
    ]


def _tasks(config: Config, problem: Problem, console: Console) -> Iterator[_Task]:
    hessian = Hessian(problem)
    others = list(peers(problem, console, COUNT))
    with console.status("reference: eigenvalues"):
        values = top_eigenpairs(hessian, COUNT, tol=1e-5, max_iter=1000).values
    yield _Task(
        f"top {COUNT}",
        config.value_error,
        1,
        lambda found: float(((found[0] - values) / values).abs().max()),
        {"stableopt": (TOLS, _our_values(problem)), **_named(others, "values")},
    )
    with console.status("reference: trace"):
        total = trace(
            hessian, tol=config.trace_error / 3, max_iter=3000, most_vectors=60, seed=1000
        ).value
    yield _Task(
        "trace",
        config.trace_error,
        config.seeds,
        lambda found: float(np.sqrt(np.mean([(value / total - 1) ** 2 for value in found]))),
        {"stableopt": ((0.03, 0.02, 0.017, 0.014, 0.012, 0.01, 7e-3, 5e-3), _our_trace(problem))}
        | _named(others, "trace"),
    )
    with console.status("reference: density"):
        starts, steps = _REFERENCE
        found = spectral_density(hessian, starts=starts, steps=steps, seed=1000)
        reference = np.array(found.nodes), np.array(found.weights)
    yield _Task(
        "density",
        config.density_error,
        config.seeds,
        lambda found: float(np.sqrt(np.mean([_distance(f, reference) ** 2 for f in found]))),
        {"stableopt": (STARTS, _our_density(problem)), **_named(others, "density")},
    )


def _named(others: list[tuple[str, str, Any, Way]], task: str) -> dict[str, tuple[Any, Way]]:
    return {name: (settings, way) for name, of, settings, way in others if of == task}


def _distance(one: tuple[Any, Any], other: tuple[Any, Any]) -> float:
    """Return the largest difference of two cumulative distributions, each shifted both ways."""
    near = 0.01 * float(other[0].max() - other[0].min())
    grid = np.sort(np.concatenate([one[0], other[0]]))

    def cumulative(nodes: Any, weights: Any, at: Any) -> Any:
        order = np.argsort(nodes)
        steps = np.concatenate([[0.0], np.cumsum(np.asarray(weights)[order])])
        return steps[np.searchsorted(np.asarray(nodes)[order], at, side="right")]

    low, high = cumulative(*one, grid - near), cumulative(*one, grid + near)
    middle = cumulative(*other, grid)
    return float(max((low - middle).max(), (middle - high).max(), 0.0))


# -- ours, each from a new operator, as a user has it --------------------------------------------------


def _our_values(problem: Problem) -> Way:
    def way(tol: float, seed: int) -> tuple[Tensor, int]:
        found = top_eigenpairs(Hessian(problem), COUNT, tol=tol, seed=seed)
        return found.values, found.products

    return way


def _our_trace(problem: Problem) -> Way:
    def way(tol: float, seed: int) -> tuple[float, int]:
        found = trace(Hessian(problem), tol=tol, seed=seed, max_iter=1000)
        return found.value, found.products

    return way


def _our_density(problem: Problem) -> Way:
    def way(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        starts, steps = setting
        found = spectral_density(Hessian(problem), starts=starts, steps=steps, seed=seed)
        return (np.array(found.nodes), np.array(found.weights)), found.products

    return way
