"""Top 10 eigenvalues, the trace and the spectral density of the Hessian: ours and other packages'.

All use the same trained network and data. Each method takes the first setting of its list that reaches
the required error against a converged reference, so that all are compared at their best. The errors are
the largest relative error of ten eigenvalues, the relative error of the trace as root mean square over
seeds, and the Kolmogorov distance of the distributions, up to a shift by a hundredth of their range.
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
"""Number of eigenvalues."""

_REFERENCE = (4, 80)
"""Number of starts and steps of the reference density."""


@dataclass(frozen=True)
class Config(timing.Config):
    """What is compared, in addition to the settings of all timings.

    Attributes:
        value_error: largest relative error of ten eigenvalues.
        trace_error: relative error of the trace, root mean square over seeds.
        density_error: Kolmogorov distance of the densities.
        seeds: number of runs for traces and densities, each with its own seed.
    """

    value_error: float = 1e-4
    trace_error: float = 0.01
    density_error: float = 0.02
    seeds: int = 3


@dataclass(frozen=True)
class _Task:
    """A quantity, its required error, and the methods, each with its settings."""

    name: str
    target: float
    seeds: int
    error: Callable[[Sequence[Any]], float]
    ways: dict[str, tuple[Sequence[Any], Way]]


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every method at the required error, print and write the table; return its rows."""
    console = console or Console()
    start = trained(config, console)
    problem = Problem(start.model, start.loss_fn, start.data)
    rows: list[dict[str, Any]] = []
    for task in _tasks(config, problem, console):
        rows += _compared(task, config)
        console.print(f"{task.name}: compared")
    t = pd.DataFrame(rows)
    title = f"Spectrum: {config.data}, d = {problem.num_params:,}, n = {config.n:,}"
    return report(config, console, "spectrum", title, {key: t[key] for key in t}, rows)


def _compared(task: _Task, config: Config) -> list[dict[str, Any]]:
    chosen: dict[str, tuple[Any, float, Way]] = {}
    for name, (settings, compute) in task.ways.items():
        for setting in settings:
            error = task.error([compute(setting, seed)[0] for seed in range(task.seeds)])
            if error <= task.target:
                break
        chosen[name] = setting, error, compute
    timings = interleaved(
        {
            name: lambda s=setting, w=compute: [w(s, seed) for seed in range(task.seeds)]  # type: ignore[misc]
            for name, (setting, _, compute) in chosen.items()
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
            "seconds": measured.median / task.seeds,
            "products": sum(products for _, products in measured.result) / task.seeds,
            "error": chosen[name][1],
            "reached": chosen[name][1] <= task.target,
        }
        for name, measured in timings.items()
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
        lambda results: float(((results[0] - values) / values).abs().max()),
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
        lambda results: float(np.sqrt(np.mean([(value / total - 1) ** 2 for value in results]))),
        {"stableopt": ((0.03, 0.02, 0.017, 0.014, 0.012, 0.01, 7e-3, 5e-3), _our_trace(problem))}
        | _named(others, "trace"),
    )
    with console.status("reference: density"):
        starts, steps = _REFERENCE
        density = spectral_density(hessian, starts=starts, steps=steps, seed=1000)
        reference = np.array(density.nodes), np.array(density.weights)
    yield _Task(
        "density",
        config.density_error,
        config.seeds,
        lambda results: float(np.sqrt(np.mean([_distance(f, reference) ** 2 for f in results]))),
        {"stableopt": (STARTS, _our_density(problem)), **_named(others, "density")},
    )


def _named(peer_methods: list[tuple[str, str, Any, Way]], task: str) -> dict[str, tuple[Any, Way]]:
    return {name: (settings, compute) for name, of, settings, compute in peer_methods if of == task}


def _distance(first: tuple[Any, Any], reference: tuple[Any, Any]) -> float:
    """Return the Kolmogorov distance of two distributions, up to a shift by 1 % of their range."""
    shift = 0.01 * float(reference[0].max() - reference[0].min())
    grid = np.sort(np.concatenate([first[0], reference[0]]))

    def cumulative(nodes: Any, weights: Any, points: Any) -> Any:
        order = np.argsort(nodes)
        steps = np.concatenate([[0.0], np.cumsum(np.asarray(weights)[order])])
        return steps[np.searchsorted(np.asarray(nodes)[order], points, side="right")]

    low, high = cumulative(*first, grid - shift), cumulative(*first, grid + shift)
    middle = cumulative(*reference, grid)
    return float(max((low - middle).max(), (middle - high).max(), 0.0))


# -- this library's methods, each with a new operator, so that nothing is cached ---------------------


def _our_values(problem: Problem) -> Way:
    def compute(tol: float, seed: int) -> tuple[Tensor, int]:
        result = top_eigenpairs(Hessian(problem), COUNT, tol=tol, seed=seed)
        return result.values, result.products

    return compute


def _our_trace(problem: Problem) -> Way:
    def compute(tol: float, seed: int) -> tuple[float, int]:
        result = trace(Hessian(problem), tol=tol, seed=seed, max_iter=1000)
        return result.value, result.products

    return compute


def _our_density(problem: Problem) -> Way:
    def compute(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        starts, steps = setting
        result = spectral_density(Hessian(problem), starts=starts, steps=steps, seed=seed)
        return (np.array(result.nodes), np.array(result.weights)), result.products

    return compute
