"""Limits against the second-moment recursion, and that recursion against torch's optimizer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableopt.stability import (
    StabilityRegion,
    UpdateRule,
    max_non_uniformity,
    max_sharpness,
    mean_square_radius,
    min_sharpness,
    noise_factor,
)

RULES = {
    "plain": {},
    "plain, weight decay": {"weight_decay": 0.7},
    "dampening without momentum": {"dampening": 0.5},
    "heavy ball": {"momentum": 0.9},
    "heavy ball, weight decay": {"momentum": 0.6, "weight_decay": 0.3},
    "dampened": {"momentum": 0.9, "dampening": 0.5},
    "moving average": {"momentum": 0.8, "dampening": 0.8, "weight_decay": 0.1},
    "negative dampening": {"momentum": 0.5, "dampening": -0.5},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "Nesterov, weight decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.4},
}


ALL_RULES = {
    **RULES,
    "decoupled decay": {"decoupled_weight_decay": 2.0},
    "AdamW": {"momentum": 0.9, "dampening": 0.9, "decoupled_weight_decay": 0.8},
    "Nesterov, decoupled": {"momentum": 0.8, "nesterov": True, "decoupled_weight_decay": 0.5},
    "NAdam": {"momentum": 0.9, "dampening": 0.9, "momentum_share": 0.6, "weight_decay": 0.2},
    "NAdam, decoupled": {
        "momentum": 0.7,
        "dampening": 0.7,
        "momentum_share": 0.4,
        "decoupled_weight_decay": 1.0,
    },
    "no share of the momentum": {"momentum": 0.9, "momentum_share": 0.0},
}


def simulated_moments(rule: dict, curvatures: list[float], steps: int) -> float:
    """Return the growth per step of E[x^2] under torch.optim.SGD, by enumerating every sequence.

    Each step draws one of ``curvatures``. The state (x, buffer) is linear in the start, so the
    second moments after a step are the mean over the draws of those after each.
    """
    # Columns of the step matrix for each curvature, read off the optimizer itself.
    matrices = []
    for h in curvatures:
        columns = []
        for x, buffer in ((1.0, 0.0), (0.0, 1.0)):
            p = torch.tensor([x], dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.SGD([p], lr=0.3, **rule)
            # Without momentum the state is x alone.
            if rule.get("momentum"):
                optimizer.state[p]["momentum_buffer"] = torch.tensor([buffer]).double()
            p.grad = h * p.detach()
            optimizer.step()
            new = optimizer.state[p].get("momentum_buffer", torch.zeros(1))
            columns.append([float(p.detach()), float(new)])
        matrices.append(np.array(columns).T)
    moments = np.eye(2)
    growth = 1.0
    for _ in range(steps):
        moments = np.mean([m @ moments @ m.T for m in matrices], axis=0)
        growth = np.trace(moments)
        moments = moments / growth
    return float(growth)


@pytest.mark.parametrize("rule", RULES)
def test_the_recursion_is_torch_optim_sgd(rule: str) -> None:
    """Catches a step matrix that is not torch's: dampening on the wrong term, Nesterov's other form,
    decay outside the buffer. Two equally likely curvatures have the mean and variance asked for.
    """
    a, s = 2.0, 1.5
    expected = simulated_moments(RULES[rule], [a - s, a + s], steps=400)
    radius = mean_square_radius(a, s**2, lr=0.3, **RULES[rule])
    # 400 power steps leave (second / first eigenvalue)^400.
    assert radius == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("lr", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_max_sharpness_is_where_the_recursion_reaches_one(rule: str, lr: float) -> None:
    """Catches a wrong constant in the closed form for any of the rules."""
    limit = max_sharpness(lr, **ALL_RULES[rule])
    # A millionth of the curvature, decoupled decay included, on either side of the edge.
    total = limit - min_sharpness(lr, **ALL_RULES[rule])
    assert mean_square_radius(limit - 1e-6 * total, 0.0, lr, **ALL_RULES[rule]) < 1
    assert mean_square_radius(limit + 1e-6 * total, 0.0, lr, **ALL_RULES[rule]) > 1


@pytest.mark.parametrize("lr", [0.01, 0.3])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_min_sharpness_is_where_the_recursion_reaches_one(rule: str, lr: float) -> None:
    """Catches a lower side that forgets decoupled decay, or weighs it without the momentum."""
    limit, options = min_sharpness(lr, **ALL_RULES[rule]), ALL_RULES[rule]
    total = max_sharpness(lr, **options) - limit
    assert mean_square_radius(limit + 1e-6 * total, 0.0, lr, **options) < 1
    assert mean_square_radius(limit - 1e-6 * total, 0.0, lr, **options) > 1


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_max_non_uniformity_is_where_the_recursion_reaches_one(rule: str, share: float) -> None:
    """Catches a wrong height of the exact region at a given sharpness."""
    lr, options = 0.2, ALL_RULES[rule]
    low = min_sharpness(lr, **options)
    a = share * (max_sharpness(lr, **options) - low) + low
    s = max_non_uniformity(lr, 4, 50, sharpness=a, **options)
    p = noise_factor(4, 50)
    assert s > 0
    assert mean_square_radius(a, p * (s * (1 - 1e-6)) ** 2, lr, **options) < 1
    assert mean_square_radius(a, p * (s * (1 + 1e-6)) ** 2, lr, **options) > 1


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_box_is_the_hull_of_the_exact_region(rule: str) -> None:
    """Catches a top of the box that the exact region exceeds, or does not touch."""
    lr, options = 0.2, ALL_RULES[rule]
    grid = np.linspace(min_sharpness(lr, **options), max_sharpness(lr, **options), 2_001)
    heights = [max_non_uniformity(lr, 4, sharpness=float(a), **options) for a in grid]
    top = max_non_uniformity(lr, 4, **options)
    # The grid misses the peak of a parabola by its spacing squared.
    assert max(heights) == pytest.approx(top, rel=1e-6)
    assert max(heights) <= top * (1 + 1e-12)


def test_the_numbers_of_the_paper() -> None:
    """Catches the finite-n form swapped for the infinite one: the paper's 100 is 104.4."""
    assert max_sharpness(0.1) == 20.0
    assert max_non_uniformity(0.1, 100) == pytest.approx(100.0)
    assert max_non_uniformity(0.1, 100, 1200) == pytest.approx(104.4, abs=0.05)
    assert max_non_uniformity(0.01, 4) == pytest.approx(200.0)
    assert max_non_uniformity(1.0, 1, momentum=0.9, nesterov=True) == pytest.approx(
        0.5114, abs=5e-5
    )
    assert max_sharpness(1.0, momentum=0.9, dampening=0.9) == pytest.approx(38.0)


def test_no_noise_no_limit() -> None:
    """Catches a division by zero for the full batch, a rate of zero, and a single sample."""
    assert max_non_uniformity(0.1, 10, 10) == math.inf
    assert max_non_uniformity(0.1, 1, 1) == math.inf
    assert max_non_uniformity(0.0, 1) == math.inf
    assert max_sharpness(0.0) == math.inf
    assert max_non_uniformity(0.1, 1, sharpness=21.0) == 0.0


@given(st.integers(2, 10_000), st.data())
def test_noise_factor_is_the_variance_of_a_mean_without_replacement(n: int, data) -> None:
    """Catches n and n - 1 exchanged: checked against n (n-1) p B = n (n - B)."""
    batch = data.draw(st.integers(1, n))
    assert noise_factor(batch, n) * batch * (n - 1) == pytest.approx(n - batch)


@pytest.mark.parametrize("n", [np.int16(30_000), torch.tensor(200, dtype=torch.uint8)], ids=repr)
def test_noise_factor_of_small_integers(n: Any) -> None:
    """Catches a product of B and n - 1 in a type that cannot hold it."""
    assert noise_factor(100, n) == noise_factor(100, int(n)) > 0


def test_noise_factor_by_enumeration() -> None:
    """Catches a formula that is right in form only: all subsets of 2 of 4 numbers."""
    import itertools

    values = np.array([1.0, 4.0, -2.0, 0.5])
    means = [values[list(pair)].mean() for pair in itertools.combinations(range(4), 2)]
    assert np.var(means) == pytest.approx(noise_factor(2, 4) * np.var(values), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_factor(0), "batch_size=0"),
        (lambda: noise_factor(5, 4), "batch_size=5 is above dataset_size=4"),
        (lambda: max_sharpness(-1.0), "lr=-1.0"),
        (lambda: max_sharpness(float("nan")), "lr=nan"),
        (lambda: max_sharpness(0.1, momentum=1.0), "momentum=1.0"),
        (lambda: max_sharpness(0.1, momentum=0.5, dampening=1.0), "dampening=1.0"),
        (lambda: max_sharpness(0.1, nesterov=True), "nesterov with momentum=0"),
        (lambda: max_sharpness(0.1, momentum_share=1.5), "momentum_share=1.5"),
        (lambda: max_sharpness(0.1, decoupled_weight_decay=-1.0), "decoupled_weight_decay=-1.0"),
        (lambda: UpdateRule(lr=float("inf")), "lr=inf"),
        (lambda: UpdateRule(lr=0.1, weight_decay=float("nan")), "weight_decay=nan"),
        (lambda: StabilityRegion(UpdateRule(0.1), 5, 4), "batch_size=5"),
        (lambda: StabilityRegion(UpdateRule(0.1), 1).contains(1, -1), "non_uniformity=-1"),
        (lambda: StabilityRegion(UpdateRule(0.1), 1).contains(1, 1, kind="ball"), "kind='ball'"),
        (lambda: StabilityRegion(UpdateRule(0.1), 1).boundary(1), "num=1"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    """Catches an error that does not name the argument."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["box", "exact"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_region_and_recursion_agree(rule: str, kind: str) -> None:
    """Catches `contains` that differs from `boundary`, and an exact region that is not exact."""
    update_rule = UpdateRule(lr=0.2, **ALL_RULES[rule])
    region = StabilityRegion(update_rule, batch_size=3, dataset_size=20)
    boundary = region.boundary(51, kind=kind)
    assert boundary.shape == (51, 2)
    for a, s in boundary[1:-1]:
        assert region.contains(a, s * (1 - 1e-9), kind=kind)
        assert not region.contains(a, s * (1 + 1e-9) + 1e-9, kind=kind)
        if kind == "exact":
            p = noise_factor(3, 20)
            radius = mean_square_radius(a, p * s**2, 0.2, **ALL_RULES[rule])
            assert radius == pytest.approx(1, abs=1e-9)
    assert not region.contains(region.max_sharpness * (1 + 1e-9) + 1e-9, 0.0, kind=kind)
    assert not region.contains(region.min_sharpness - 1e-9, 0.0, kind=kind)


def test_gradient_descent_has_no_top() -> None:
    """Catches a limit on non-uniformity where nothing is drawn."""
    for region in (
        StabilityRegion(UpdateRule(0.1)),
        StabilityRegion(UpdateRule(0.1, full_batch=True), 3, 20),
        StabilityRegion(UpdateRule(0.1), 20, 20),
    ):
        assert region.max_non_uniformity == math.inf
        assert region.contains(19.0, 1e9)
        assert not region.contains(21.0, 0.0)


def test_no_noise_is_allowed_where_the_mean_is_unstable() -> None:
    """Catches a formula that turns positive again beyond the region: Nesterov's denominator changes
    sign, and a full batch has no limit only where it is stable.
    """
    options = {"momentum": 0.9, "nesterov": True}
    for a in (-3.0, -1e-6, 1e3):
        assert max_non_uniformity(0.1, 1, sharpness=a, **options) == 0.0
        assert mean_square_radius(a, 0.0, 0.1, **options) > 1
    assert max_non_uniformity(0.1, 10, 10, sharpness=1000.0) == 0.0
    with pytest.raises(ValueError, match=r"lr=0\.0"):
        StabilityRegion(UpdateRule(lr=0.0), 4).boundary()
