"""Other packages' largest eigenvalue of a Hessian, used as in their documentation.

Each entry of ``PEERS`` returns a function that returns eigenvalue, unit eigenvector and the number of
products (``None`` if unknown), or raises ``ImportError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature import Problem

__all__ = ["PEERS", "batch_of"]

Find = Callable[[], tuple[float, Tensor, int | None]]


def batch_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return all data of a problem as inputs and targets."""
    (batch, _), *more_chunks = problem.chunks()
    if more_chunks:
        raise ValueError(
            "problem: expected a single chunk, as other packages take all data at once"
        )
    x, y = batch
    return x, y


def _flat(tensors: Any) -> Tensor:
    return torch.cat([torch.as_tensor(t).reshape(-1) for t in tensors])


def curvlinops_eigsh(problem: Problem, tol: float, seed: int) -> Find:
    """Prepare curvlinops' operator with SciPy's ``eigsh``, whose tolerance is on the Ritz residual."""
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    batch = batch_of(problem)

    def find() -> tuple[float, Tensor, int | None]:
        operator = HessianLinearOperator(
            problem.model, problem.loss_fn, list(problem.params), [batch], check_deterministic=False
        ).to_scipy()
        start = torch.randn(problem.num_params, generator=torch.Generator().manual_seed(seed))
        values, vectors = eigsh(operator, k=1, which="LA", tol=tol, v0=start.numpy())
        return float(values[0]), torch.from_numpy(vectors[:, 0]).to(problem.params[0]), None

    return find


def pyhessian(problem: Problem, tol: float, seed: int) -> Find:
    """Prepare PyHessian's power iteration, which stops when the *value* changes by less than tol."""
    from pyhessian import hessian

    batch = batch_of(problem)
    cuda = problem.device.type == "cuda"

    def find() -> tuple[float, Tensor, int | None]:
        torch.manual_seed(seed)
        # It leaves gradients with their graph in .grad, removed below.
        computer = hessian(problem.model, problem.loss_fn, data=batch, cuda=cuda)
        values, vectors = computer.eigenvalues(maxIter=200, tol=tol, top_n=1)
        for p in problem.params:
            p.grad = None
        return float(values[0]), _flat(vectors[0]).detach(), None

    return find


def eigenthings_lanczos(problem: Problem, tol: float, seed: int) -> Find:
    """Prepare hessian-eigenthings' Lanczos.

    It takes a fixed number of steps and checks convergence afterwards. It therefore gets the smallest
    multiple of 5 steps after which it reports convergence.
    """
    from hessian_eigenthings import HessianOperator, lanczos, supervised_loss

    operator = HessianOperator(problem.model, [batch_of(problem)], supervised_loss(problem.loss_fn))

    def search(steps: int) -> Any:
        return lanczos(operator, k=1, max_iter=steps, tol=tol, which="LA", seed=seed)

    steps = next(m for m in range(5, 1000, 5) if bool(torch.as_tensor(search(m).converged).all()))

    def find() -> tuple[float, Tensor, int | None]:
        result = search(steps)
        vector = torch.as_tensor(result.eigenvectors).reshape(-1)
        return float(result.eigenvalues[0]), vector, steps

    return find


def eigenthings_power(problem: Problem, tol: float, seed: int) -> Find:
    """Prepare hessian-eigenthings' power iteration."""
    from hessian_eigenthings import HessianOperator, power_iteration_one, supervised_loss

    operator = HessianOperator(problem.model, [batch_of(problem)], supervised_loss(problem.loss_fn))

    def find() -> tuple[float, Tensor, int | None]:
        value, vector, _, products, _ = power_iteration_one(
            operator, max_iter=200, tol=tol, seed=seed
        )
        return value, vector, products

    return find


PEERS: dict[str, Callable[[Problem, float, int], Find]] = {
    "curvlinops, SciPy eigsh": curvlinops_eigsh,
    "hessian-eigenthings, Lanczos": eigenthings_lanczos,
    "hessian-eigenthings, power": eigenthings_power,
    "PyHessian": pyhessian,
}
