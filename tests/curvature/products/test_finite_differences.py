"""Central differences: their step, their error estimate, and products by them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from oracles import SineOnce, covariance, dense_hessians, relative_error, small_data
from torch import Tensor, nn

import stableopt
from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Problem,
    SecondDerivativeError,
)
from stableopt.curvature.products.finite_differences import CentralDifferences, DifferenceError
from stableopt.stability import batch_sharpness

RATES = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)


def exponentials(dtype: torch.dtype, noise: float = 0.0) -> Any:
    """Return a gradient exp(r_i h), whose derivative is r_i, with noise as of a cruder kernel."""

    def gradient(distance: float) -> Tensor:
        values = (RATES * distance).exp()
        chance = torch.Generator().manual_seed(hash(distance) % 2**31)
        errors = torch.rand(len(RATES), generator=chance, dtype=torch.float64) - 0.5
        return (values * (1 + noise * errors)).to(dtype)

    return gradient


@pytest.mark.parametrize(
    ("dtype", "noise"),
    [
        (torch.float64, 0.0),
        (torch.float64, 1e-10),
        (torch.float64, 1e-6),
        (torch.float32, 0.0),
        (torch.float32, 1e-4),
    ],
)
def test_the_step_suits_the_noise(dtype: torch.dtype, noise: float) -> None:
    """Catches a step chosen for absent noise, and one that takes all noise for rounding.

    At the best step the error is of the order of noise^(2/3); a factor of 30 leaves room for the
    constants, and a step ten times off would cost a factor of a hundred.
    """
    differences = CentralDifferences()
    slope = differences.along(exponentials(dtype, noise), size=1.0)
    error = relative_error(slope.double(), RATES)
    level = max(noise, torch.finfo(dtype).eps)
    assert error < 30 * level ** (2 / 3)
    # The reported error is of the size of the true one, within a small factor.
    assert error < 5 * differences.error
    assert differences.error < 30 * level ** (2 / 3)


def test_a_straight_gradient_does_not_stretch_the_step() -> None:
    """Catches a step that grows along a direction without a cubic term, at the cost of others."""
    differences = CentralDifferences()
    differences.along(lambda h: RATES * h, size=1.0)
    assert differences.step is not None
    assert differences.step < 1e-3
    slope = differences.along(exponentials(torch.float64), size=1.0)
    assert relative_error(slope, RATES) < 1e-6


def test_a_gradient_that_jumps_is_refused() -> None:
    """Catches a value made from a jump, which grows as the step shrinks."""
    with pytest.raises(DifferenceError, match="two steps disagree"):
        CentralDifferences().along(
            lambda h: torch.tensor([h, float(h > 0)], dtype=torch.float64), size=1.0
        )


def test_later_products_are_looked_at_too() -> None:
    """Catches a self-check that ends once the step is chosen."""
    differences = CentralDifferences()
    differences.along(exponentials(torch.float64), size=1.0)
    before = differences.error
    differences.along(exponentials(torch.float64, noise=1e-8), size=1.0)
    assert differences.error > 10 * before
    differences.along(exponentials(torch.float64, noise=1.0), size=1.0)  # the third is not checked
    with pytest.raises(DifferenceError):
        differences.along(exponentials(torch.float64, noise=1.0), size=1.0)


class Sine(nn.Module):
    """The sine, by a kernel that is differentiable once, or by torch's."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        return SineOnce.apply(x) if self.once else x.sin()


def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Sine(once=True), nn.Linear(3, 3)).double()
    twin = copy.deepcopy(model)
    twin[1].once = False
    return model, twin


def test_everything_that_the_hessian_can_do() -> None:
    """Catches products, non-uniformity or batch sharpness that differ from the Hessian's method.

    1e-7: differences in double precision are good to some 1e-10 of the largest curvature.
    """
    (model, twin), data = twins(), small_data()
    problem, plain = (Problem(m, nn.MSELoss(), data) for m in (model, twin))
    dense = dense_hessians(twin, nn.MSELoss(), *data)
    identity = torch.eye(problem.num_params, dtype=torch.float64)
    assert relative_error(Hessian(problem) @ identity, dense.mean(0)) < 1e-7
    scaled = problem.transformed(scale=[2.0] * 4, weight_decay=[0.5] * 4, sign=-1.0)
    expected = -4 * dense.mean(0) + 2 * identity
    assert relative_error(Hessian(scaled) @ identity, expected) < 1e-7
    sigma = NonUniformity(problem)
    assert sigma.method == "loop"
    assert relative_error(sigma @ identity, covariance(dense)) < 1e-7
    actual, exact = (batch_sharpness(p, 3, num_batches=4).value for p in (problem, plain))
    assert actual == pytest.approx(exact, rel=1e-7)
    assert Hessian(problem).loss() == pytest.approx(plain.value(), rel=1e-12)


def kinked_gradient(h: float) -> Tensor:
    """Return a slope of (1, 2) between kinks at all multiples of 1e-4, with (0.5, 0) more at each."""
    kinks = math.floor(h / 1e-4 + 0.5)
    return torch.tensor([h + 0.5e-4 * kinks, 2 * h], dtype=torch.float64)


def test_many_kinks_are_not_averaged_over() -> None:
    """Catches the slope 1.5, on which all steps over many kinks agree, reported instead of 1.

    1e-6: without a kink the differences lack rounding alone, 1e-16 over a step of 1e-6 or less.
    """
    differences = CentralDifferences(kinks=True)
    slope = differences.along(kinked_gradient, size=1000.0)
    assert relative_error(slope, torch.tensor([1.0, 2.0], dtype=torch.float64)) < 1e-6
    assert differences.error < 1e-6


def test_a_kink_at_the_point_is_refused_with_kinks_known() -> None:
    """Catches half a jump taken for a slope, however short the steps."""
    with pytest.raises(DifferenceError, match="the gradient jumps"):
        CentralDifferences(kinks=True).along(
            lambda h: torch.tensor([h, float(h > 0)], dtype=torch.float64), size=1.0
        )


@pytest.mark.parametrize("seed", [1, 5, 13])
def test_differences_of_a_network_with_kinks_have_the_sharpness_of_its_twin(seed: int) -> None:
    """Catches a converged 1.15 where 0.71 is right: float32 differences that step over kinks.

    1e-3: twice the solver's tolerance squared, over a gap of a few percent, and float32 elsewhere.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Sine(once=True), nn.Linear(16, 4))
    data = torch.randn(64, 8), torch.randint(4, (64,))
    margins = stableopt.measure(model, nn.CrossEntropyLoss(), data, quantities=("sharpness",))
    model[2].once = False
    twin = stableopt.measure(model, nn.CrossEntropyLoss(), data, quantities=("sharpness",))
    assert margins.method == "central differences, in float64"
    assert margins.converged
    assert margins.sharpness == pytest.approx(twin.sharpness, rel=1e-3)


def test_what_needs_double_backward_says_so() -> None:
    """Catches a Gauss–Newton matrix, or per-sample products in one pass, that silently lack a part."""
    problem = Problem(twins()[0], nn.MSELoss(), small_data())
    for refused in (
        lambda: NonUniformity(problem, method="vmap"),
        lambda: GaussNewton(problem),
        lambda: stableopt.critical_lr(problem, 2),
    ):
        with pytest.raises(SecondDerivativeError, match=r"module '1' \(Sine\)"):
            refused()


def test_a_measurement_is_no_better_than_its_products() -> None:
    """Catches a residual below the error of the differences, and a claim to have converged."""
    model = twins()[0].float()
    data = tuple(t.float() for t in small_data())
    margins = [
        stableopt.measure(model, nn.MSELoss(), data, quantities=("sharpness",), tol=tol)
        for tol in (1e-1, 1e-7)
    ]
    assert [m.method for m in margins] == ["central differences"] * 2
    assert [m.converged for m in margins] == [True, False]
    assert margins[1].measurements["sharpness"].residual > 1e-7
