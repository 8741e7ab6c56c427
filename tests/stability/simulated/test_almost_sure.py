"""The almost sure threshold: closed forms in one dimension, random matrices, and SGD itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from first_order import half_squares
from sample_factors import factors
from scipy.optimize import brentq
from torch import nn

import stableopt
from stableopt import UpdateRule, almost_sure_critical_lr
from stableopt.curvature.gram.gram import DualCurvature, Modes
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.simulated.almost_sure import lyapunov_exponent


def one_dimension(*curvatures: float) -> DualCurvature:
    """Return samples with these second derivatives in one dimension."""
    rows = torch.tensor(curvatures, dtype=torch.float64).sqrt().unsqueeze(1)
    return DualCurvature(rows @ rows.T, len(curvatures))


def product_of_matrices(modes: Modes, step: LinearStep, size: int, steps: int) -> float:
    """Return the exponent of a long product of dense random matrices on parameter and buffer."""
    samples = (modes.factors.mT @ modes.factors).numpy()
    n, r, _ = samples.shape
    eye, zero = np.eye(r), np.zeros((r, r))
    generator = np.random.default_rng(1)
    x, total = np.concatenate([generator.standard_normal(r), np.zeros(r)]), 0.0
    for index in range(steps):
        batch = generator.choice(n, size, replace=False)
        gradient = np.hstack([samples[batch].mean(0) + step.weight_decay * eye, zero])
        buffer = np.hstack([zero, step.momentum * eye]) + step.gain * gradient
        update = gradient + step.momentum * buffer if step.nesterov else buffer
        x = np.vstack([np.hstack([eye, zero]) - step.lr * update, buffer]) @ x
        norm = np.linalg.norm(x)
        x /= norm
        if index >= steps // 10:
            total += math.log(norm)
    return total / (steps - steps // 10)


@pytest.mark.parametrize(
    ("curvatures", "low", "high"), [((0.2, 3.8), 0.53, 0.6), ((1.0, 6.0), 0.3, 0.57)]
)
def test_one_dimension(curvatures: tuple[float, ...], low: float, high: float) -> None:
    """The threshold is where E log|1 - lr h| = 0. Catches a mean of squares in its place."""
    h = np.array(curvatures)
    exact = brentq(lambda lr: np.log(abs(1 - lr * h)).mean(), low, high)
    dual = one_dimension(*curvatures)
    critical = almost_sure_critical_lr(dual, 1, replicas=128, steps=1000)
    assert critical.value == pytest.approx(exact, rel=0.01)
    # The bracket has two standard errors on either side; the upper side is doubled.
    assert (
        critical.lower - (exact - critical.lower)
        < exact
        < critical.upper + (critical.upper - critical.value)
    )
    assert critical.value > stableopt.critical_lr(dual, 1).value


@pytest.mark.parametrize(
    ("size", "step"),
    [
        (1, LinearStep(0.1)),
        (1, LinearStep(0.4)),
        (2, LinearStep(0.3, momentum=0.9, dampening=0.5)),
        (2, LinearStep(0.2, momentum=0.5, nesterov=True, weight_decay=0.1)),
    ],
)
def test_against_a_product_of_dense_matrices(size: int, step: LinearStep) -> None:
    """Catches a wrong momentum, and a growth of the square for that of the norm."""
    modes = Modes.from_factors(factors(5, 1, 2))
    exponent = lyapunov_exponent(modes, step, size)
    exact = product_of_matrices(modes, step, size, 20_000)
    # Four standard errors of one estimate, and as much again for the other, of about as many steps.
    assert abs(exponent.per_step - exact) < 8 * exponent.standard_error
    assert exponent.standard_error < 0.1 * abs(exact) + 0.01


@pytest.mark.parametrize("reshuffled", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_samples_that_are_alike(size: int, reshuffled: bool) -> None:
    """All batches are one: log |1 - lr|, without error."""
    modes = Modes.from_factors(torch.ones(4, 1, 1))
    step = LinearStep(0.5)
    exponent = lyapunov_exponent(modes, step, size, reshuffled=reshuffled, replicas=8, steps=40)
    assert exponent.per_step == pytest.approx(math.log(0.5), rel=1e-12)
    assert exponent.standard_error < 1e-12


def test_reshuffled_batches_in_one_dimension() -> None:
    """An epoch has every sample once: its growth is the same in every order."""
    dual = one_dimension(0.2, 3.8)
    step = LinearStep(0.55)
    exponent = lyapunov_exponent(dual.modes, step, 1, reshuffled=True, replicas=8, steps=160)
    exact = (math.log(abs(1 - 0.55 * 0.2)) + math.log(abs(1 - 0.55 * 3.8))) / 2
    assert exponent.per_step == pytest.approx(exact, rel=1e-10)


def test_the_full_batch_is_gradient_descent() -> None:
    """With B = n the threshold is 2/a, and known exactly."""
    dual = DualCurvature.from_factors(factors(4, 1, 3))
    critical = almost_sure_critical_lr(dual, 4)
    assert critical.value == critical.lower == critical.upper == pytest.approx(2 / dual.sharpness)


@pytest.mark.parametrize(
    ("rows", "exact"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 2.0),  # the product of both samples' matrices is 0
        ([[0.0, 0.0], [1.0, 0.0]], 2.0),
        ([[1.0, 0.0], [0.0, 3.0**0.5]], 2 / 3),  # two exponents; the larger one counts
    ],
)
def test_samples_without_common_directions(rows: list[list[float]], exact: float) -> None:
    """Half of the steps leave a direction unchanged. Catches a start that they reduce to zero."""
    factor = torch.tensor(rows, dtype=torch.float64)
    critical = almost_sure_critical_lr(DualCurvature(factor @ factor.T, 2), 1)
    # A direction's curvature is h in half of the steps and 0 else: |1 - lr h| = 1 at lr = 2/h.
    assert critical.value == pytest.approx(exact, rel=0.01)


def test_a_threshold_above_that_without_noise() -> None:
    """At lr = 1 every step with h = 1 ends at the minimum, though lr = 2/a is the limit of GD."""
    critical = almost_sure_critical_lr(one_dimension(1.0, 3.0), 1, replicas=64, steps=1000)
    h = np.array([1.0, 3.0])
    exact = brentq(lambda lr: np.log(abs(1 - lr * h)).mean(), 1.05, 3.0)
    assert critical.full_batch == pytest.approx(1.0)
    assert critical.value == pytest.approx(exact, rel=0.01)


def test_sgd_converges_between_the_two_thresholds_and_not_above() -> None:
    """Four fitted samples and ``torch.optim.SGD``. Catches a threshold on the wrong side."""
    rows = factors(4, 1, 2, seed=3).squeeze(1)
    model = nn.Linear(2, 1, bias=False).double()

    y = model(rows).detach()
    fitted = model.weight.detach().clone()
    critical = almost_sure_critical_lr(model, half_squares, (rows, y), batch_size=1)
    mean_square = stableopt.critical_lr(model, half_squares, (rows, y), batch_size=1).value
    assert mean_square < critical.lower

    def distance(lr: float) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            model.weight.copy_(fitted + 0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for i in torch.randint(4, (1500,)):
            optimizer.zero_grad()
            half_squares(model(rows[i]), y[i]).backward()
            optimizer.step()
        return float((model.weight.detach() - fitted).norm())

    assert distance((mean_square + critical.value) / 2) < 1e-3
    assert distance(1.1 * critical.value) > 1e3


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", 5), ("replicas", 7), ("steps", 2), ("seed", 0.5)],
)
def test_arguments_out_of_range(name: str, value: Any) -> None:
    """The message names the argument and its value."""
    arguments: dict[str, Any] = {"batch_size": 2, "replicas": 8, "steps": 40, name: value}
    modes = Modes.from_factors(factors(4, 1, 2))
    size = arguments.pop("batch_size")
    with pytest.raises(ValueError, match=f"{name}={value}"):
        lyapunov_exponent(modes, LinearStep(0.1), size, **arguments)


def test_no_curvature_too_much_and_an_exact_hit() -> None:
    """Infinite where nothing can grow; growth without end is infinite, not NaN; so is an exact hit."""
    flat = DualCurvature(torch.zeros(2, 2), 2)
    assert almost_sure_critical_lr(flat, 1).value == math.inf
    decayed = UpdateRule(lr=1.0, weight_decay=0.1)
    assert almost_sure_critical_lr(flat, 1, update_rule=decayed).value == pytest.approx(20)
    modes = Modes.from_factors(factors(3, 1, 2))
    assert lyapunov_exponent(modes, LinearStep(1e200), 1).per_step == math.inf
    alike = Modes.from_factors(torch.ones(2, 1, 1))
    assert lyapunov_exponent(alike, LinearStep(1.0), 1).per_step == -math.inf
    rule = UpdateRule(lr=1.0, decoupled_weight_decay=0.1)
    with pytest.raises(ValueError, match="update_rule"):
        almost_sure_critical_lr(DualCurvature(torch.eye(2), 2), 1, update_rule=rule)


@pytest.mark.parametrize(
    "step",
    [
        LinearStep(0.1, decoupled_weight_decay=0.1),
        LinearStep(0.1, filter=((1.0,), (1.0, -0.9))),
        LinearStep(0.1, momentum=0.9, momentum_share=0.5),
    ],
)
def test_steps_that_are_not_simulated(step: LinearStep) -> None:
    """An error, and not the exponent of another step."""
    modes = Modes.from_factors(factors(4, 1, 2))
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        lyapunov_exponent(modes, step, 2)
