"""Reshuffled batches: enumeration of all orders, closed forms, and a simulation of SGD itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from first_order import half_squares
from sample_factors import factors
from torch import nn

import stableopt
from stableopt import UpdateRule
from stableopt.curvature.gram.gram import DualCurvature, Modes
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.simulated.reshuffled import reshuffled_critical_lr, reshuffled_growth


def enumerated(
    modes: Modes, step: LinearStep, batch_size: int, *, drop_last: bool = False
) -> float:
    """Return the logarithm of the radius of an epoch's operator, from all n! orders."""
    samples = modes.factors.mT @ modes.factors
    n, r, _ = samples.shape
    eye, zero = torch.eye(r).double(), torch.zeros(r, r).double()
    total, count = torch.zeros(4 * r * r, 4 * r * r).double(), 0
    for order in itertools.permutations(range(n)):
        epoch = torch.eye(2 * r).double()
        for batch in torch.tensor(order).split(batch_size):
            if drop_last and len(batch) < batch_size:
                continue
            gradient = torch.cat([samples[batch].mean(0) + step.weight_decay * eye, zero], 1)
            buffer = torch.cat([zero, step.momentum * eye], 1) + step.gain * gradient
            update = gradient + step.momentum * buffer if step.nesterov else buffer
            parameter = torch.cat([eye, zero], 1) - step.lr * update
            epoch = torch.cat([parameter, buffer]) @ epoch
        total += torch.kron(epoch, epoch)
        count += 1
    return math.log(float(torch.linalg.eigvals(total / count).abs().max()))


@pytest.mark.parametrize(
    ("n", "outputs", "d", "batch_size", "step"),
    [
        (3, 1, 2, 1, LinearStep(0.3)),
        (4, 2, 3, 1, LinearStep(0.25)),
        (4, 1, 2, 2, LinearStep(0.5, momentum=0.9, dampening=0.5)),
        (5, 1, 2, 2, LinearStep(0.3, momentum=0.5, nesterov=True, weight_decay=0.1)),
    ],
)
def test_growth_against_all_orders(
    n: int, outputs: int, d: int, batch_size: int, step: LinearStep
) -> None:
    """The last case has a smaller last batch. Catches batches that are drawn independently, a
    resampling that forgets what is left of an epoch, and a wrong momentum.
    """
    modes = Modes.from_factors(factors(n, outputs, d))
    growth = reshuffled_growth(modes, step, batch_size, replicas=256)
    exact = enumerated(modes, step, batch_size)
    # Four standard errors, and the bias of a finite population.
    assert abs(growth.per_epoch - exact) < 4 * growth.standard_error + 4 / 256
    assert growth.standard_error < 0.05 * (1 + abs(exact))


def test_growth_without_the_last_batch() -> None:
    """Catches a forecast of growth on samples that the epoch leaves out."""
    modes, step = Modes.from_factors(factors(5, 1, 2)), LinearStep(0.7)
    growth = reshuffled_growth(modes, step, 2, replicas=256, drop_last=True)
    exact = enumerated(modes, step, 2, drop_last=True)
    assert abs(exact - enumerated(modes, step, 2)) > 0.05
    assert abs(growth.per_epoch - exact) < 4 * growth.standard_error < 0.05


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_samples_that_are_alike(batch_size: int) -> None:
    """All orders are one: K log (1 - lr)^2, without error."""
    modes = Modes.from_factors(torch.ones(4, 1, 1))
    growth = reshuffled_growth(modes, LinearStep(0.5), batch_size, replicas=8, epochs=8)
    assert growth.per_epoch == pytest.approx(
        2 * math.ceil(4 / batch_size) * math.log(0.5), rel=1e-12
    )
    assert growth.standard_error < 1e-12


def test_the_full_batch_is_gradient_descent() -> None:
    """With B = n the threshold is 2/a."""
    dual = DualCurvature.from_factors(factors(4, 1, 3))
    critical = reshuffled_critical_lr(dual, 4, replicas=8, epochs=8)
    assert critical.value == critical.lower == critical.upper == pytest.approx(2 / dual.sharpness)


def test_a_threshold_above_that_without_noise() -> None:
    """With h = 1 and 3 an epoch is (1 - lr)(1 - 3 lr): it shrinks up to 4/3, and GD up to 1."""
    rows = torch.tensor([[1.0], [3.0]], dtype=torch.float64).sqrt()
    critical = reshuffled_critical_lr(DualCurvature(rows @ rows.T, 2), 1, replicas=128)
    assert critical.full_batch == pytest.approx(1)
    # The bias of a finite population.
    assert critical.value == pytest.approx(4 / 3, rel=2 / 128)
    assert critical.lower < 4 / 3 < critical.upper


def test_threshold_of_a_model_brackets_that_of_all_orders() -> None:
    """Catches a bracket on the wrong side, and a problem whose curvature is not its samples'."""
    rows = factors(4, 1, 2, seed=3).squeeze(1)
    model = nn.Linear(2, 1, bias=False).double()

    critical = reshuffled_critical_lr(
        model, half_squares, (rows, model(rows).detach()), batch_size=1
    )
    modes = DualCurvature(rows @ rows.T, 4).modes
    assert critical.lower < critical.value < critical.upper
    assert enumerated(modes, LinearStep(critical.lower), 1) < 0
    assert enumerated(modes, LinearStep(critical.upper), 1) > 0


def test_reshuffling_allows_more_than_independent_batches() -> None:
    """The batches of an epoch cancel each other's noise; a small last batch undoes this."""
    rows = factors(4, 1, 2, seed=3).squeeze(1)
    dual = DualCurvature(rows @ rows.T, 4)
    assert reshuffled_critical_lr(dual, 1, epochs=24).lower > stableopt.critical_lr(dual, 1).value
    three_rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    ragged = DualCurvature(three_rows @ three_rows.T, 3)
    assert reshuffled_critical_lr(ragged, 2).upper < stableopt.critical_lr(ragged, 2).value


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", 5), ("replicas", 7), ("epochs", 6), ("seed", -1)],
)
def test_arguments_out_of_range(name: str, value: int) -> None:
    """The message names the argument and its value."""
    arguments = {"batch_size": 2, "replicas": 8, "epochs": 8, name: value}
    modes = Modes.from_factors(factors(4, 1, 2))
    size = arguments.pop("batch_size")
    with pytest.raises(ValueError, match=f"{name}={value}"):
        reshuffled_growth(modes, LinearStep(0.1), size, **arguments)


def test_seven_epochs_have_a_standard_error() -> None:
    """Catches one block after the epochs at the start, whose spread is NaN: never sure."""
    growth = reshuffled_growth(Modes.from_factors(factors(4, 1, 2)), LinearStep(0.2), 2, epochs=7)
    assert 0 < growth.standard_error < math.inf


def test_no_curvature_and_too_much() -> None:
    """Infinite where nothing can grow; growth without end is infinite, not NaN."""
    flat = DualCurvature(torch.zeros(2, 2), 2)
    assert reshuffled_critical_lr(flat, 1).value == math.inf
    decayed = UpdateRule(lr=1.0, weight_decay=0.1)
    assert reshuffled_critical_lr(flat, 1, update_rule=decayed).value == pytest.approx(20)
    modes = Modes.from_factors(factors(3, 1, 2))
    assert reshuffled_growth(modes, LinearStep(1e200), 1).per_epoch == math.inf
    rule = UpdateRule(lr=1.0, decoupled_weight_decay=0.1)
    with pytest.raises(ValueError, match="update_rule"):
        reshuffled_critical_lr(DualCurvature(torch.eye(2), 2), 1, update_rule=rule)
