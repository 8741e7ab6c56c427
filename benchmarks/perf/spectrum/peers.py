"""Other packages' spectra, used as in their documentation, with lists of settings to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.perf.eigenvalues.peers import batch_of
from stableopt.curvature import Problem

__all__ = ["BUDGETS", "STARTS", "STEPS", "TOLS", "Way", "peers"]

Way = Callable[[Any, int], tuple[Any, int]]
"""Takes a setting and a seed, and returns a result and the number of products."""

TOLS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4)
STEPS = (20, 25, 30, 35, 40, 50, 60, 80, 100)
BUDGETS = (36, 48, 60, 90, 120, 150, 180, 240, 300, 360)
STARTS = ((1, 40), (2, 40), (4, 40), (8, 40))


def peers(problem: Problem, console: Console, count: int) -> Iterator[tuple[str, str, Any, Way]]:
    """Yield name, task, settings and function of each method of the installed packages."""
    for name, methods in (("hessian-eigenthings", _eigenthings), ("curvlinops", _curvlinops)):
        try:
            yield from methods(problem, count)
        except ImportError as error:
            console.print(f"{name}: left out, {error}; pip install 'stableopt[bench-peers]'")


def _eigenthings(problem: Problem, count: int) -> Iterator[tuple[str, str, Any, Way]]:
    import hessian_eigenthings as package

    def operator() -> Any:
        loss = package.supervised_loss(problem.loss_fn)
        return package.HessianOperator(problem.model, [batch_of(problem)], loss)

    def values(steps: int, seed: int) -> tuple[Tensor, int]:
        result = package.lanczos(operator(), k=count, max_iter=steps, which="LA", seed=seed)
        return torch.as_tensor(result.eigenvalues).double().cpu().sort(
            descending=True
        ).values, steps

    def total(budget: int, seed: int) -> tuple[float, int]:
        result = package.hutch_plus_plus(operator(), num_matvecs=budget, seed=seed)
        return float(result.estimate), budget

    def density(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        starts, steps = setting
        result = package.spectral_density(
            operator(), num_runs=starts, lanczos_steps=steps, seed=seed
        )
        nodes, weights = result.raw_eigenvalues.reshape(-1), result.raw_weights.reshape(-1) / starts
        valid = ~torch.isnan(nodes)
        return (nodes[valid].cpu().numpy(), weights[valid].cpu().numpy()), starts * steps

    yield "hessian-eigenthings, Lanczos", "values", STEPS, values
    yield "hessian-eigenthings, Hutch++", "trace", BUDGETS, total
    yield "hessian-eigenthings, SLQ", "density", STARTS, density


def _curvlinops(problem: Problem, count: int) -> Iterator[tuple[str, str, Any, Way]]:
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
        matrix, products = operator().to_scipy(), 0

        def product(vector: Any) -> Any:
            nonlocal products
            products += 1
            return matrix @ vector

        counted = LinearOperator(matrix.shape, matvec=product, dtype=matrix.dtype)
        start = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(seed))
        parts = eigsh(
            counted, k=count, which="LA", tol=tol, v0=start.numpy(), return_eigenvectors=False
        )
        return torch.from_numpy(np.sort(parts)[::-1].astype(float).copy()), products

    def hutchpp(budget: int, seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        return float(package.hutchpp_trace(operator(), budget)), budget

    def xtrace(budget: int, seed: int) -> tuple[float, int]:
        torch.manual_seed(seed)
        return float(package.xtrace(operator(), budget)), budget

    def density(setting: tuple[int, int], seed: int) -> tuple[Any, int]:
        torch.manual_seed(seed)
        starts, steps = setting
        matrix, parts = operator(), []
        for _ in range(starts):
            nodes, vectors = fast_lanczos(matrix, steps)
            parts.append((nodes.cpu().numpy(), vectors[0].square().cpu().numpy() / starts))
        columns = zip(*parts, strict=True)
        return tuple(np.concatenate(part) for part in columns), starts * steps

    yield "curvlinops, SciPy eigsh", "values", TOLS, values
    yield "curvlinops, Hutch++", "trace", BUDGETS, hutchpp
    yield "curvlinops, XTrace", "trace", BUDGETS, xtrace
    yield "curvlinops, SLQ", "density", STARTS, density
