"""Batch sharpness in both definitions, its limit, the momentum form, and the sharpest batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import Problem, UpdateRule, measure
from stableopt.stability import (
    LinearStep,
    batch_sharpness,
    batch_sharpness_limit,
    largest_batch_sharpness,
    mean_square_radius,
)

DOUBLE = torch.float64


def problem_of(rows: int = 6, chunk_size: int | None = None) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(rows, 3, dtype=DOUBLE)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    return Problem(model, nn.MSELoss(), (x, x[:, :1] ** 2), chunk_size=chunk_size)


def of_samples(problem: Problem, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return gradient and dense Hessian of the mean loss of some samples."""
    theta = problem.theta()
    with problem.evaluation():
        ((x, y),) = [batch for batch, _ in problem.chunks()]
        loss = problem.loss(theta, (x[rows], y[rows]))
        slopes = torch.autograd.grad(loss, theta, create_graph=True)
        flat = torch.cat([slope.reshape(-1) for slope in slopes])
        hessian_rows = [torch.autograd.grad(entry, theta, retain_graph=True) for entry in flat]
    columns = [torch.cat([block.reshape(-1) for block in row]) for row in hessian_rows]
    return flat.detach(), torch.stack(columns)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_definitions_and_momentum_form_by_dense_matrices(chunk_size: int | None) -> None:
    """Catches definitions that are swapped, and a direction used in one factor alone."""
    problem, unchunked = problem_of(chunk_size=chunk_size), problem_of()
    samples = [of_samples(unchunked, [row]) for row in range(6)]
    buffer = torch.linspace(-0.3, 0.4, problem.num_params, dtype=DOUBLE)
    for step in (None, lambda g: 0.9 * buffer + g):
        directions = [g if step is None else step(g) for g, _ in samples]
        pairs = zip(directions, samples, strict=True)
        above, below = zip(*[(s @ h @ s, s @ g) for s, (g, h) in pairs], strict=True)
        sharpness = batch_sharpness(problem, 1, step=step)
        assert sharpness.value == pytest.approx(float(sum(above) / sum(below)), rel=1e-10)
        ratios = [float(a / b) for a, b in zip(above, below, strict=True)]
        assert sharpness.mean_of_ratios == pytest.approx(sum(ratios) / 6, rel=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_limit_is_the_mean_square_threshold(momentum: float, share: float) -> None:
    """At E[h^2]/E[h] of the limit the second moments neither grow nor shrink; the closed form agrees."""
    lr = 0.1
    a = share * 2 * (1 + momentum) / lr
    limit = batch_sharpness_limit(LinearStep(lr, momentum=momentum), a)
    assert limit is not None
    assert limit == pytest.approx(2 * (1 - momentum) / lr + 2 * momentum * a / (1 + momentum))
    variance = limit * a - a**2
    # A radius of 1 has a square-root derivative at most: ten digits leave six.
    assert mean_square_radius(a, variance, lr, momentum=momentum) == pytest.approx(1, abs=1e-6)
    assert mean_square_radius(a, 1.02 * variance, lr, momentum=momentum) > 1


def test_limit_joins_the_plateaus() -> None:
    """Catches limits that grow beyond the rule's own, or are known without a sharpness."""
    rule = LinearStep(0.1, momentum=0.9)
    assert batch_sharpness_limit(rule, 1e-9) == pytest.approx(2.0)
    assert batch_sharpness_limit(rule, 38.0) == pytest.approx(38.0)
    assert batch_sharpness_limit(rule, 1e6) == pytest.approx(38.0)
    assert batch_sharpness_limit(rule, None) is None
    assert batch_sharpness_limit(rule, -1.0) is None
    assert batch_sharpness_limit(LinearStep(0.1), None) == 20.0
    assert batch_sharpness_limit(LinearStep(0.0), 1.0) == math.inf


def test_margins_have_the_limit_at_the_measured_sharpness() -> None:
    """Catches a limit at another sharpness, or one where none was measured."""
    problem = problem_of()
    rule = UpdateRule(lr=0.1, momentum=0.9)
    names = ("sharpness", "batch_sharpness", "mean_batch_sharpness")
    options: dict[str, Any] = {"update_rule": rule, "batch_size": 2}
    margins = measure(problem, **options, quantities=names)
    limit = batch_sharpness_limit(rule.linear_step, margins.sharpness)
    assert margins.batch_sharpness_limit == margins["mean_batch_sharpness"].limit == limit
    assert margins.batch_sharpness_ratio == pytest.approx(margins.batch_sharpness / limit)
    assert measure(problem, **options, quantities=names[1:]).batch_sharpness_limit is None
    plain = measure(problem, lr=0.1, batch_size=2, quantities=names[1:])
    assert plain.batch_sharpness_limit == 20.0


def test_sequential_stop() -> None:
    """Catches averages that go on, that stop at one lucky pair, and errors that are not reported."""
    problem = problem_of(40)
    full = batch_sharpness(problem, 2, num_batches=200)
    loose = batch_sharpness(problem, 2, num_batches=200, rel_error=0.3)
    assert loose.converged
    assert 8 <= loose.batches < 200
    assert loose.standard_error <= 0.3 * loose.value
    # Five standard errors of the shorter average.
    assert abs(loose.value - full.value) < 5 * loose.standard_error
    bounded = batch_sharpness(problem, 2, num_batches=10, rel_error=1e-6)
    assert (bounded.batches, bounded.converged) == (10, False)


def test_sharpest_batch_between_its_bounds() -> None:
    """By enumeration: no batch is sharper than the upper bound, and one is as sharp as the lower."""
    problem = problem_of()
    for size in (1, 2, 6):
        sharpest = max(
            float(torch.linalg.eigvalsh(of_samples(problem, list(rows))[1])[-1])
            for rows in itertools.combinations(range(6), size)
        )
        sharpness = largest_batch_sharpness(problem, size, num_batches=40)
        # Eigen-searches to 1e-3, with upper bounds that are up to 5 % higher.
        assert sharpness.lower == pytest.approx(sharpest, rel=1e-3)
        assert sharpest <= sharpness.upper
        if size != 2:
            assert sharpness.upper <= 1.06 * sharpest
        assert sharpness.certifies(1.9 / sharpness.upper)
        assert not sharpness.certifies(2.1 / sharpness.upper)
    margins = measure(problem, lr=0.1, batch_size=2, quantities=("largest_batch_sharpness",))[
        "largest_batch_sharpness"
    ]
    assert (margins.limit, margins.lower < margins.value) == (20.0, True)


def test_arguments() -> None:
    problem = problem_of()
    with pytest.raises(ValueError, match="rel_error=0"):
        batch_sharpness(problem, 1, rel_error=0)
    with pytest.raises(ValueError, match="batch_size=7 is above the 6 samples"):
        batch_sharpness(problem, 7)
    with pytest.raises(ValueError, match=r"step: returned \(1,\)"):
        batch_sharpness(problem, 1, step=lambda g: g[:1])
    with pytest.raises(ValueError, match="num_batches=0"):
        largest_batch_sharpness(problem, 1, num_batches=0)
