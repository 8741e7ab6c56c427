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
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.perf import timing
from benchmarks.perf.eigenvalues import trained
from benchmarks.perf.peers import batch_of
from benchmarks.perf.timing import interleaved, report
from benchmarks.training.loops import mean_squared_error
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


Way = Callable[[Any, int], tuple[Any, int]]
"""Takes a setting and a seed, and returns a result and the number of products."""


@dataclass(frozen=True)
class _Task:
    name: str
    target: float
    seeds: int
    error: Callable[[Sequence[Any]], float]
    ways: dict[str, tuple[Sequence[Any], Way]]


_TOLS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4)
_STEPS = (20, 25, 30, 35, 40, 50, 60, 80, 100)
_BUDGETS = (36, 48, 60, 90, 120, 180, 240, 360)
_STARTS = ((1, 40), (2, 40), (4, 40), (8, 40))


def run(config: Config, console: Console | None = None) -> list[dict[str, Any]]:
    """Time every way at the required error, print and write the table; return its rows."""
    console = console or Console()
    _, model, images = trained(config, console)
    problem = Problem(model, mean_squared_error, (images.x, images.y))
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
    peers = list(_peers(problem, console))
    with console.status("reference: eigenvalues"):
        values = top_eigenpairs(hessian, COUNT, tol=1e-5, max_iter=1000).values
    yield _Task(
        f"top {COUNT}",
        config.value_error,
        1,
        lambda found: float(((found[0] - values) / values).abs().max()),
        {"stableopt": (_TOLS, _our_values(problem)), **_named(peers, "values")},
    )
    with console.status("reference: trace"):
        total = trace(hessian, tol=config.trace_error / 3, max_iter=3000, most_vectors=60).value
    yield _Task(
        "trace",
        config.trace_error,
        config.seeds,
        lambda found: float(np.sqrt(np.mean([(value / total - 1) ** 2 for value in found]))),
        {"stableopt": ((0.03, 0.02, 0.015, 0.01, 7e-3, 5e-3), _our_trace(problem))}
        | _named(peers, "trace"),
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
        {"stableopt": (_STARTS, _our_density(problem)), **_named(peers, "density")},
    )


def _named(peers: list[tuple[str, str, Any, Way]], task: str) -> dict[str, tuple[Any, Way]]:
    return {name: (settings, way) for name, of, settings, way in peers if of == task}


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


# -- other packages, as their documentation says -------------------------------------------------------


def _peers(problem: Problem, console: Console) -> Iterator[tuple[str, str, Any, Way]]:
    for name, ways in (("hessian-eigenthings", _eigenthings), ("curvlinops", _curvlinops)):
        try:
            yield from ways(problem)
        except ImportError as error:
            console.print(f"{name}: left out, {error}; pip install 'stableopt[bench-peers]'")


def _eigenthings(problem: Problem) -> Iterator[tuple[str, str, Any, Way]]:
    import hessian_eigenthings as package

    def operator() -> Any:
        loss = package.supervised_loss(problem.loss_fn)
        return package.HessianOperator(problem.model, [batch_of(problem)], loss)

    def values(steps: int, seed: int) -> tuple[Tensor, int]:
        found = package.lanczos(operator(), k=COUNT, max_iter=steps, which="LA", seed=seed)
        return torch.as_tensor(found.eigenvalues).double().cpu().sort(descending=True).values, steps

    def total(budget: int, seed: int) -> tuple[float, int]:
        found = package.hutch_plus_plus(operator(), num_matvecs=budget, seed=seed)
        return float(found.estimate), budget

    def density(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        starts, steps = setting
        found = package.spectral_density(
            operator(), num_runs=starts, lanczos_steps=steps, seed=seed
        )
        nodes, weights = found.raw_eigenvalues.reshape(-1), found.raw_weights.reshape(-1) / starts
        known = ~torch.isnan(nodes)
        return (nodes[known].cpu().numpy(), weights[known].cpu().numpy()), starts * steps

    yield "hessian-eigenthings, Lanczos", "values", _STEPS, values
    yield "hessian-eigenthings, Hutch++", "trace", _BUDGETS, total
    yield "hessian-eigenthings, SLQ", "density", _STARTS, density


def _curvlinops(problem: Problem) -> Iterator[tuple[str, str, Any, Way]]:
    import curvlinops as package
    from curvlinops.papyan2020traces.spectrum import fast_lanczos
    from scipy.sparse.linalg import LinearOperator, eigsh

    def operator() -> Any:
        return package.HessianLinearOperator(
            problem.model,
            problem.loss_fn,
            list(problem.params),
            [batch_of(problem)],
            check_deterministic=False,
        )

    def values(tol: float, seed: int) -> tuple[Tensor, int]:
        matrix, count = operator().to_scipy(), 0

        def product(vector: Any) -> Any:
            nonlocal count
            count += 1
            return matrix @ vector

        counted = LinearOperator(matrix.shape, matvec=product, dtype=matrix.dtype)
        start = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(seed))
        found = eigsh(
            counted, k=COUNT, which="LA", tol=tol, v0=start.numpy(), return_eigenvectors=False
        )
        return torch.from_numpy(np.sort(found)[::-1].astype(float).copy()), count

    def hutchpp(budget: int, seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        return float(package.hutchpp_trace(operator(), budget)), budget

    def xtrace(budget: int, seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        return float(package.xtrace(operator(), budget)), budget

    def density(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        torch.manual_seed(seed)
        starts, steps = setting
        matrix, found = operator(), []
        for _ in range(starts):
            nodes, vectors = fast_lanczos(matrix, steps)
            found.append((nodes.cpu().numpy(), vectors[0].square().cpu().numpy() / starts))
        parts = zip(*found, strict=True)
        return tuple(np.concatenate(part) for part in parts), starts * steps

    yield "curvlinops, SciPy eigsh", "values", _TOLS, values
    yield "curvlinops, Hutch++", "trace", _BUDGETS, hutchpp
    yield "curvlinops, XTrace", "trace", _BUDGETS, xtrace
    yield "curvlinops, SLQ", "density", _STARTS, density
