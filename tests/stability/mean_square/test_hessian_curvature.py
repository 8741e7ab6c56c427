"""Thresholds where samples are not fitted: their own Hessians, against the dense recursion."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from oracles import dense_hessians, small_data, small_network
from torch import Tensor, nn

import stableopt
from stableopt import UpdateRule, critical_batch_size, critical_lr, measure
from stableopt.curvature import DualCurvature, NonFiniteError, Problem
from stableopt.stability import noise_factor
from stableopt.stability.mean_square import hessian_curvature
from stableopt.stability.mean_square.choice import FITTED

RULES = {
    "plain": UpdateRule(1.0),
    "heavy ball": UpdateRule(1.0, momentum=0.9),
    "nesterov": UpdateRule(1.0, momentum=0.9, nesterov=True),
}

GROWS = 1e-9
"""Rounding of the spectral radius of a few hundred rows."""


def square(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).square().mean()


class Curved(nn.Module):
    """x_0 w + x_1 w^2 / 2: the second input is the curvature of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * self.w + x[:, 1:] * self.w**2 / 2


def unfitted(curvature: float = 6.0) -> Problem:
    """Return four samples with residual 1 and H_i = 2 +- 2c, whose mean 2 is Gauss–Newton's."""
    c = curvature
    x = torch.tensor([[1, c], [1, -c], [-1, c], [-1, -c]], dtype=torch.float64)
    return Problem(Curved(), square, (x, -torch.ones(4, 1, dtype=torch.float64)))


@cache
def noisy_minimum(seed: int) -> tuple[Problem, Tensor, float]:
    """Return a minimum of least squares with noisy labels, its samples' Hessians, and the decay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x) + 0.3 * torch.randn(8, 1, generator=generator, dtype=torch.float64)
    decay, loss_fn = 0.05, nn.MSELoss()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x), y)
        loss = loss + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    hessians = dense_hessians(model, loss_fn, x, y)
    assert float(torch.linalg.eigvalsh(hessians.mean(0))[0]) + decay > 1e-4
    return Problem(model, loss_fn, (x, y)), hessians, decay


def growth(hessians: Tensor, p: float, rule: UpdateRule, decay: float, lr: float) -> float:
    """Return the growth of the second moments of (x, buffer) in a step, from dense matrices.

    A batch's Hessian deviates from the mean with p times the covariance of a sample's.
    """
    d = hessians.shape[1]
    eye, zero = torch.eye(d).double(), torch.zeros(d, d).double()
    beta = rule.momentum

    def step(h: Tensor) -> Tensor:
        buffer = torch.cat([h, beta * eye], dim=1)
        along = torch.cat([h, zero], dim=1) + beta * buffer if rule.nesterov else buffer
        return torch.cat([torch.cat([eye, zero], dim=1) - lr * along, buffer])

    mean = step(hessians.mean(0) + decay * eye)
    differences = [step(h + decay * eye) - mean for h in hessians]
    noise = torch.stack([torch.kron(difference, difference) for difference in differences]).mean(0)
    moments = torch.kron(mean, mean) + p * noise
    return float(torch.linalg.eigvals(moments).abs().max())


def test_residuals_that_cancel_in_the_mean() -> None:
    """eta* = 2a / (a^2 + s^2) = 4 / (4 + 4 c^2). Catches samples that count as fitted since the mean
    Hessian is Gauss–Newton's: its threshold, 1, is 37 times too large.
    """
    problem, expected = unfitted(), 4 / (4 + 4 * 36)
    critical = critical_lr(problem, 1)
    assert critical.hessians == "true"
    assert critical.value == pytest.approx(expected, rel=1e-6)
    assert critical.lower == critical.theorem1 == pytest.approx(expected, rel=1e-6)
    assert critical.exact
    assert critical.residual_share == pytest.approx((36 / 37) ** 0.5)
    of_gauss_newton = critical_lr(problem, 1, hessians="gauss-newton")
    assert of_gauss_newton.value == pytest.approx(1.0)
    assert of_gauss_newton.hessians == "gauss-newton"
    assert critical_batch_size(problem, expected) == 1
    assert critical_batch_size(problem, expected * 1.001) == 2
    assert stableopt.suggest(problem, batch_sizes=(1,)).answer("SGD", 1).lr == critical.value
    for lr in (0.99 * expected, 1.01 * expected):
        margins = measure(problem, lr=lr, batch_size=1, quantities=("theorem1", "critical_lr"))
        assert margins.theorem1 is not None
        assert margins.critical_lr_ratio is not None
        assert (margins.theorem1 > 1) == (margins.critical_lr_ratio > 1) == (lr > expected)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_second_moments_turn_at_the_exact_threshold(name: str, seed: int) -> None:
    """Catches any slip in the recursion of indefinite samples: the dense one grows a millionth above
    the value, and not below it nor at the lower bound.
    """
    problem, hessians, decay = noisy_minimum(seed)
    rule = RULES[name]
    with_decay = UpdateRule(1.0, rule.momentum, nesterov=rule.nesterov, weight_decay=decay)
    for batch_size in (1, 3, 8):
        p = noise_factor(batch_size, 8)
        critical = critical_lr(problem, batch_size, update_rule=with_decay, tol=1e-6)
        assert critical.exact
        assert critical.hessians == "true"
        for lr, grows in ((1 - 1e-6, False), (1 + 1e-6, True)):
            assert (growth(hessians, p, rule, decay, lr * critical.value) > 1 + GROWS) == grows
        assert growth(hessians, p, rule, decay, critical.lower) <= 1 + GROWS
        assert critical.lower >= 0.99 * critical.value


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dense", [True, False])
def test_leading_directions_bound_the_threshold(
    name: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bound on the wrong side: as for larger models, with two directions of each kind,
    and with or without the mean square of all. Other seeds give other eigenvectors and other
    bounds, which must hold as well.
    """
    problem, hessians, decay = noisy_minimum(1)
    rule = RULES[name]
    with_decay = UpdateRule(1.0, rule.momentum, nesterov=rule.nesterov, weight_decay=decay)
    exact = critical_lr(problem, 2, update_rule=with_decay, tol=1e-6).value
    monkeypatch.setattr(hessian_curvature, "MAX_PARAMETERS", 0)
    monkeypatch.setattr(hessian_curvature, "MAX_DENSE", 256 if dense else 0)
    for seed in range(3):
        critical = critical_lr(problem, 2, update_rule=with_decay, directions=2, seed=seed)
        assert not critical.exact
        assert critical.value >= exact * (1 - 1e-6)
        assert growth(hessians, noise_factor(2, 8), rule, decay, critical.lower) <= 1 + GROWS
        assert critical.lower > 0 or not dense


def test_negative_curvature_is_said_instead_of_a_stable_rate() -> None:
    """Catches a stable learning rate at a saddle, for every entry point."""
    model, data = small_network(), small_data()
    problem = Problem(model, nn.MSELoss(), data)
    least = float(torch.linalg.eigvalsh(dense_hessians(model, nn.MSELoss(), *data).mean(0))[0])
    assert least < 0
    for rule in RULES.values():
        for batch_size in (1, 7):
            critical = critical_lr(problem, batch_size, update_rule=rule)
            assert not critical.exact
            assert critical.lower == 0
            assert critical.obstacle is not None
            assert f"negative curvature here, {least:.3g}" in critical.obstacle
            assert 0 < critical.value <= critical.full_batch
        assert critical_batch_size(problem, 1e-3, update_rule=rule) is None
    # Weight decay above it makes a minimum of the saddle.
    decayed = critical_lr(problem, 1, update_rule=UpdateRule(1.0, weight_decay=1.01 * -least))
    assert decayed.exact
    assert 0 < decayed.lower <= decayed.value
    suggested = stableopt.suggest(problem, batch_sizes=(1,))
    assert all(row.lower is None and not row.exact for row in suggested.rows)
    assert any("negative curvature" in note for note in suggested.notes)


def test_a_direction_that_is_flat_only_in_the_mean() -> None:
    """Catches a flat direction dropped from the recursion although single samples curve along it: with
    batches its second moment grows at any rate, with all samples at none.
    """

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1] * self.w[:1] + x[:, 1:] * self.w[1:] ** 2 / 2

    x = torch.tensor([[1, 3], [-1, 3], [1, -3], [-1, -3]], dtype=torch.float64)
    problem = Problem(Two(), nn.MSELoss(), (x, torch.ones(4, 1, dtype=torch.float64)))
    critical = critical_lr(problem, 1)
    assert critical.lower == critical.theorem1 == 0
    assert critical.obstacle is not None
    assert "their mean has none" in critical.obstacle
    full = critical_lr(problem, 4)
    assert full.obstacle is None
    assert full.lower == full.value == pytest.approx(1.0)
    assert critical_batch_size(problem, 0.5) == 4


class Diagonal(nn.Module):
    """x w^2 / 2: at zero, the samples' Hessians are diagonal, with any entries."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x * self.w**2).sum(1, keepdim=True)


@pytest.mark.parametrize("few_entries", [True, False])
@pytest.mark.parametrize("mean", [1e-5, 0.0])
@pytest.mark.parametrize(
    ("d", "dtype"), [(64, torch.float32), (64, torch.float64), (80, torch.float32)]
)
def test_curvature_that_cancels_below_the_root_of_the_rounding(
    d: int, dtype: torch.dtype, mean: float, few_entries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eta* = 2a / (a^2 + s^2) along the last direction, for s = 0.8 % of the top. Catches its s, taken
    from mean squares whose rounding in single precision is larger, counted as rounding: a stable rate
    of 2. With too few entries allowed, blocks of parts of the directions show it as well.
    """
    if not few_entries:
        monkeypatch.setattr(hessian_curvature, "_ENTRIES", 4 * 10**2)
    curvature = torch.full((4, d), 0.5, dtype=dtype)
    curvature[:, 0] = 1.0
    curvature[:, 1 : d // 2] = 0.0
    curvature[:, -1] = mean + 0.008 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=dtype)
    data = curvature / 2, -torch.ones(4, 1, dtype=dtype)
    critical = critical_lr(Problem(Diagonal(d).to(dtype), square, data), 1, with_hessian=False)
    expected = 2 * mean / (mean**2 + 0.008**2)
    if dtype == torch.float64 and mean > 0:
        assert critical.obstacle is None
        assert critical.lower <= expected * (1 + 1e-9)
        assert critical.lower == pytest.approx(expected, rel=1e-6 if few_entries else 0.5)
    else:  # the mean itself is below the rounding
        assert critical.lower == 0
        assert "samples have curvature, 0.008" in str(critical.obstacle)
        assert not critical.exact


def test_small_curvature_of_single_samples_does_not_cancel() -> None:
    """Catches an obstacle where one sample has all of a curvature that is rounding in the mean: no
    sample has a negative one, so the direction is stable like the others.
    """
    rows = torch.zeros(100, 64)
    rows[:, 0] = 1.0
    rows[0, 1] = 0.05
    model = nn.Linear(64, 1, bias=False)
    critical = critical_lr(model, square, (rows, torch.ones(100, 1)), 1, hessians="true")
    assert critical.obstacle is None
    assert critical.exact


class Single(nn.Module):
    """x_1 w + x_0 w^2 / 2: at zero, H_i has curvature of the outputs and of the residual."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x[..., 0] * self.w**2 + x[..., 1] * self.w).sum(1, keepdim=True)


@pytest.mark.parametrize("d", [40, 64, 65, 400])
def test_the_share_does_not_depend_on_the_number_of_parameters(d: int) -> None:
    """eta* = 2a / (a^2 + c^2) along the last of d parameters. Catches a share that is averaged over
    random directions, which falls with d: the samples counted as fitted from 100 parameters on, with a
    threshold 9 times too large.
    """
    a, c = 1e-4, 0.03
    x = torch.zeros(4, d, 2, dtype=torch.float64)
    x[:, 0, 1] = 2**-0.5  # curvature 1 along the first
    x[:, -1, 0] = (a + c * torch.tensor([1.0, -1.0, 1.0, -1.0])) / 2
    problem = Problem(Single(d), square, (x, -torch.ones(4, 1).double()))
    critical = critical_lr(problem, 1, with_hessian=False)
    assert critical.residual_share == pytest.approx((a**2 + c**2) ** 0.5, rel=1e-6)
    assert critical.hessians == "true"
    assert critical.value == pytest.approx(2 * a / (a**2 + c**2), rel=1e-4)


def test_fitted_samples_use_their_rows() -> None:
    """Catches true Hessians, which many parameters make inexact, where Gauss–Newton is the same."""
    model, (x, _) = small_network(), small_data()
    problem = Problem(model, nn.MSELoss(), (x, model(x).detach()))
    critical = critical_lr(problem, 2)
    assert critical.hessians == "gauss-newton"
    assert critical.residual_share == 0
    assert critical.value == critical_lr(DualCurvature.from_problem(problem), 2).value
    true = critical_lr(problem, 2, hessians="true", tol=1e-6)
    assert true.exact
    assert true.value == pytest.approx(critical_lr(problem, 2, tol=1e-6).value, rel=1e-6)


def test_bad_choices_are_named() -> None:
    """Catches a choice that is ignored."""
    dual = DualCurvature(torch.eye(4), 4)
    with pytest.raises(ValueError, match="hessians='exact': expected one of"):
        critical_lr(dual, 1, hessians="exact")
    with pytest.raises(ValueError, match="hessians='true': expected a Problem"):
        critical_lr(dual, 1, hessians="true")
    assert math.isinf(critical_lr(DualCurvature(torch.zeros(3, 3), 3), 1).value)


@pytest.mark.parametrize("hessians", ["auto", "true"])
def test_a_hessian_that_is_not_finite_is_no_flat_sample(hessians: str) -> None:
    """Catches a sample whose NaN counts as no curvature: every learning rate was stable."""

    class Distance(nn.Module):  # not differentiable where it is zero
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).square().sqrt().unsqueeze(-1)

    x = torch.tensor([[0.5, 1.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0], [0.3]], dtype=torch.float64)
    for ask, argument in ((critical_lr, 1), (critical_batch_size, 0.1)):
        with pytest.raises(NonFiniteError, match="not finite"):
            ask(Distance(), nn.MSELoss(), (x, y), argument, hessians=hessians)


def test_a_bound_that_decides_has_no_residual() -> None:
    """Catches an infinite residual of an answer that took no eigen-solve."""
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64).repeat(3, 1)
    found = critical_lr(model, nn.MSELoss(), (x, model(x).detach()), 1, hessians="true")
    assert (found.converged, found.products, found.residual) == (True, 0, 0.0)
    assert found.value == pytest.approx(2 / 10)


@pytest.mark.parametrize("few_parameters", [True, False])
def test_samples_that_are_nearly_fitted(
    few_parameters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lower bound of Gauss–Newton matrices reported for the loss. With few parameters,
    Hessians are used all the same; with many, which the test pretends, the lower bound allows for
    the residual share.
    """
    model, (x, _) = small_network(), small_data()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    data = x, model(x).detach() + 2e-3 * noise
    problem, decay = Problem(model, nn.MSELoss(), data), 0.05
    true = critical_lr(problem, 2, update_rule=UpdateRule(1.0, weight_decay=decay), tol=1e-6)
    assert true.residual_share is not None
    assert 1e-9 < true.residual_share < FITTED
    assert (true.hessians, true.exact) == ("true", True)
    if not few_parameters:
        monkeypatch.setattr(hessian_curvature, "_ENTRIES", 0)
    critical = critical_lr(problem, 2, update_rule=UpdateRule(1.0, weight_decay=decay))
    assert critical.hessians == ("true" if few_parameters else "gauss-newton")
    assert critical.lower <= true.value * (1 + 1e-6)  # the search's tolerance
    assert critical.value == pytest.approx(true.value, rel=2 * true.residual_share)
