"""``stableopt.LBFGS`` finds known minima, and those that SciPy finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_runs import DIRECTIONS
from scipy import optimize
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import stableopt


def minimise(
    function: Callable[[Tensor], Tensor], start: list[float], **options: Any
) -> tuple[Tensor, stableopt.LBFGS]:
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = stableopt.LBFGS(
        [x], max_iter=200, tolerance_grad=1e-10, tolerance_change=0, **options
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach(), optimizer


def rosenbrock(x: Tensor) -> Tensor:
    return ((1 - x[:-1]).square() + 100 * (x[1:] - x[:-1].square()).square()).sum()


def beale(x: Tensor) -> Tensor:
    a, b = x
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (rosenbrock, [-1.2, 1.0], [1.0, 1.0]),
        (rosenbrock, [-1.2, 1.0] * 5, [1.0] * 10),
        (beale, [1.0, 1.0], [3.0, 0.5]),
    ],
    ids=["rosenbrock", "rosenbrock_10", "beale"],
)
def test_known_minima(
    function: Callable[[Tensor], Tensor], start: list[float], minimum: list[float], direction: Any
) -> None:
    """Catches a line search that stops short of the minimum in curved valleys."""
    x, _ = minimise(function, start, line_search_fn="strong_wolfe", direction=direction)
    # The gradient is below 1e-10 and the smallest curvature above 0.1: x is within 1e-9.
    torch.testing.assert_close(x, torch.tensor(minimum, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logistic_regression_has_scipys_minimum(direction: Any) -> None:
    """Catches a minimum of another function; the optimizer's weight decay is the penalty here."""
    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    x = torch.tensor(features, dtype=torch.float64)
    sign = torch.tensor(2.0 * labels - 1, dtype=torch.float64)
    penalty = 0.01

    def mean_loss(weight: Tensor) -> Tensor:
        return nn.functional.softplus(-sign * (x @ weight)).mean()

    weight, _ = minimise(
        mean_loss,
        [0.0] * 30,
        line_search_fn="strong_wolfe",
        weight_decay=penalty,
        direction=direction,
    )

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        w = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        loss = mean_loss(w) + penalty / 2 * w.square().sum()
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), gradient.numpy()

    solution = optimize.minimize(
        value_and_gradient,
        [0.0] * 30,
        jac=True,
        method="L-BFGS-B",
        options={"ftol": 0, "gtol": 1e-10, "maxiter": 10_000},
    )
    # Strongly convex with 0.01: gradients of 1e-9 (where SciPy's search gives up) are within 1e-7.
    torch.testing.assert_close(weight, torch.tensor(solution.x), rtol=0, atol=1e-6)
