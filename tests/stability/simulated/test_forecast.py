"""Accuracy of the growth of reshuffled batches, where samples contract or expand strongly.

The oracles are exact: a product in one dimension, and the second moments over all subsets of drawn
samples in two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stableopt.curvature.gram.gram import DualCurvature, Modes
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.simulated.forecast import Forecast
from stableopt.stability.simulated.reshuffled import (
    _mean_growth,
    reshuffled_critical_lr,
    reshuffled_growth,
)

STRONG = [2.8699, 0.9916, 10.7268, 1.0681, 7.3853, 7.7893, 1.3402, 0.0508]
"""Curvatures of samples in one dimension: some contract to almost zero, and others expand."""

ROWS = [[-0.76, -0.27], [-1.92, -0.57], [0.24, -0.93], [-0.93, -0.41], [0.04, 0.86]]
"""Rows of five samples in two dimensions."""


def of_subsets(rows: Tensor, lr: float) -> float:
    """Return the logarithm of the growth of an epoch with B = 1, for ``rows`` ``(n, d)``.

    The mean over all orders of the samples in a subset is that over its last sample and all orders of
    the others, so 2^n matrices suffice.
    """
    n, d = rows.shape
    steps = torch.eye(d).double() - lr * rows.unsqueeze(2) * rows.unsqueeze(1)
    moments = torch.stack([torch.kron(step, step) for step in steps])
    means = [torch.eye(d * d).double()]
    for subset in range(1, 1 << n):
        drawn = [i for i in range(n) if subset >> i & 1]
        before = torch.stack([means[subset ^ (1 << i)] for i in drawn])
        means.append((moments[drawn] @ before).mean(0))
    return math.log(float(torch.linalg.eigvals(means[-1]).abs().max()))


def two_dimensions(seed: int) -> Tensor:
    """Return rows of ten samples, more spread in one direction than in the other."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, 2, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([1.0, 0.2], dtype=torch.float64)


def one_dimension(n: int) -> Tensor:
    """Return the curvatures of n samples in one dimension, ``(n,)``."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator, dtype=torch.float64).square()


@pytest.mark.parametrize("n", [8, 16, 64])
def test_one_dimension_has_no_error(n: int) -> None:
    """With B = 1 every order of an epoch multiplies by the product of (1 - lr h)^2. Catches replicas
    selected in mid-epoch because their contracting samples are still ahead.
    """
    h = one_dimension(n)
    modes = Modes.from_factors(h.sqrt().view(n, 1, 1))
    for lr in (1 / float(h.max()), 3 / float(h.max())):
        lr *= 1 + 1e-3  # at 1 / h the growth is minus infinity
        growth = reshuffled_growth(modes, LinearStep(lr), 1, replicas=32, epochs=12)
        exact = 2 * float((1 - lr * h).abs().log().sum())
        assert growth.per_epoch == pytest.approx(exact, rel=1e-9)
        assert growth.standard_error < 1e-9


def test_threshold_in_one_dimension() -> None:
    """Catches a bracket whose lower end grows."""
    h = torch.tensor(STRONG, dtype=torch.float64)
    dual = DualCurvature(h.sqrt().unsqueeze(1) * h.sqrt(), len(h))
    critical = reshuffled_critical_lr(dual, 1, replicas=32, epochs=16)
    growth = [float((1 - lr * h).abs().log().sum()) for lr in (critical.lower, critical.upper)]
    assert growth[0] < 0 < growth[1]
    assert critical.upper / critical.lower < 1 + 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_dimensions_against_all_subsets(seed: int) -> None:
    """Catches a growth that is too small by more than its error says."""
    rows = two_dimensions(seed)
    lr = 6 / float(rows.square().sum(1).max())
    growth = reshuffled_growth(Modes.from_factors(rows.unsqueeze(1)), LinearStep(lr), 1)
    assert abs(growth.per_epoch - of_subsets(rows, lr)) < 3 * growth.standard_error
    assert growth.standard_error < 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_threshold_in_two_dimensions(seed: int) -> None:
    """Catches a bracket next to the threshold, for instance from an early stop after few blocks."""
    rows = two_dimensions(seed)
    dual = DualCurvature.from_factors(rows.unsqueeze(1))
    critical = reshuffled_critical_lr(dual, 1, epochs=24)
    assert of_subsets(rows, critical.lower) < 0 < of_subsets(rows, critical.upper)
    assert critical.upper / critical.lower < 1.3


def test_growth_that_a_forecast_misses() -> None:
    """The mean over the ten cuts of five samples into batches of three and two. Few of these grow, from
    states that the first batch leaves small. Catches selection after the first batch.
    """
    rows = torch.tensor(ROWS, dtype=torch.float64)
    modes, step = Modes.from_factors(rows.unsqueeze(1)), LinearStep(2.1)
    samples = modes.factors.mT @ modes.factors
    total, eye = torch.zeros(4, 4).double(), torch.eye(2).double()
    for first in itertools.combinations(range(5), 3):
        last = [i for i in range(5) if i not in first]
        epoch = (eye - 2.1 * samples[last].mean(0)) @ (eye - 2.1 * samples[list(first)].mean(0))
        total += torch.kron(epoch, epoch) / 10
    exact = math.log(float(torch.linalg.eigvals(total).abs().max()))
    growth = reshuffled_growth(modes, step, 3)
    assert abs(growth.per_epoch - exact) < 3 * growth.standard_error < 0.15


def test_growth_next_to_flat_directions() -> None:
    """Catches a start in which directions without growth hide one that grows by 2 % per epoch."""
    h, lr = torch.full((16,), 1e-4, dtype=torch.float64), 1.0
    h[0] = 1 + math.exp(0.01)
    modes = Modes.from_factors(
        torch.diag(h.sqrt()).unsqueeze(1)
    )  # every sample has its own direction
    growth = reshuffled_growth(modes, LinearStep(lr), 1)
    assert growth.per_epoch == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("epochs", [12, 48])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_the_error_of_log_normal_factors(spread: float, epochs: int) -> None:
    """The mean of a log-normal factor is exp(mu + spread^2 / 2). Catches a bias low by the second
    term, and errors of few blocks that are too small.
    """
    generator = torch.Generator().manual_seed(0)
    outside = 0
    for _ in range(400):
        logs = -0.5 + spread * torch.randn(epochs, generator=generator, dtype=torch.float64)
        growth = _mean_growth(logs.tolist())
        exact = -0.5 + spread**2 / 2
        outside += abs(growth.per_epoch - exact) > 2 * growth.standard_error
    assert outside < 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)  # 5 %, and three deviations


def test_any_forecast_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a forecast that is not undone at the end of an epoch, or after selection."""
    observe: Callable[..., None] = Forecast.observe

    def wrong(self: Forecast, *args: Tensor, left: int) -> None:
        self._effects[:] = torch.linspace(-0.3, 0.3, 10)
        observe(self, *args, left=left)

    rows = two_dimensions(0)
    lr = 2 / float(rows.square().sum(1).max())
    modes = Modes.from_factors(rows.unsqueeze(1))
    monkeypatch.setattr(Forecast, "observe", wrong)
    growth = reshuffled_growth(modes, LinearStep(lr), 1, replicas=256)
    assert abs(growth.per_epoch - of_subsets(rows, lr)) < 3 * growth.standard_error < 0.1


def test_effects_of_batches() -> None:
    """The effects of samples add up to those of batches. Catches a missing factor for the others in a
    sample's batch: these are the five other samples, of opposite effect.
    """
    effects = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    pairs = torch.combinations(torch.arange(6))
    forecast = Forecast(6, 2, len(pairs), torch.device("cpu"))
    weights, growth = torch.ones(len(pairs)).double(), effects[pairs].sum(1).exp()
    forecast.observe(pairs, weights, growth, left=4)
    forecast.begin_epoch()
    forecast.observe(pairs, weights, growth, left=4)
    # The mean is of growths, not of their logarithms: a second-order difference.
    torch.testing.assert_close(forecast.log_growth, -effects[pairs].sum(1), rtol=0, atol=0.05)
