"""Linear filters of gradients: the closed forms of momentum, and filters that have none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import small_data, small_network
from torch import nn

from stableopt import StabilityRegion, UpdateRule, critical_lr
from stableopt.stability import LinearStep, batch_sharpness_limit, mean_square_radius
from stableopt.stability.rules.filters import Filter, matrices, stable_range
from stableopt.steering.lr_laws import momentum_gate
from stableopt.steering.target import lr_at_limit


def adan(beta1: float, beta2: float) -> Filter:
    """Return the filter of Adan: m + beta2 d, where m averages g, and d averages g - g'."""
    mean, difference = np.array([1 - beta1]), beta2 * (1 - beta2) * np.array([1.0, -1.0])
    denominator1, denominator2 = np.array([1.0, -beta1]), np.array([1.0, -beta2])
    num = np.polymul(mean, denominator2), np.polymul(difference, denominator1)
    return tuple(np.append(num[0], 0.0) + num[1]), tuple(np.polymul(denominator1, denominator2))


def ademamix(beta1: float, beta3: float, alpha: float) -> Filter:
    """Return the filter of AdEMAMix: m + alpha s, the fast and the slow average."""
    denominator1, denominator3 = np.array([1.0, -beta1]), np.array([1.0, -beta3])
    num = (1 - beta1) * denominator3 + alpha * (1 - beta3) * denominator1
    return tuple(num), tuple(np.polymul(denominator1, denominator3))


def schedule_free(c: float, beta: float, mu: float) -> Filter:
    """Return the filter of schedule-free steps: the gradient is at y = (1 - beta) z + beta x, with
    momentum mu in z.
    """
    num = (1 - mu) * np.array([1 - beta + beta * c, -(1 - beta) * (1 - c)])
    return tuple(num), tuple(np.polymul([1.0, -mu], [1.0, -(1 - c)]))


FILTERS: dict[str, Filter] = {
    "Adan": adan(0.98, 0.92),
    "AdEMAMix": ademamix(0.9, 0.9999, 5.0),
    "schedule-free with momentum": schedule_free(0.01, 0.95, 0.9),
    "mean of three": ((1 / 3, 1 / 3, 1 / 3), (1.0,)),
    "a delay": ((0.0, 1.0), (1.0,)),
    "complex poles": ((0.3, 0.1), (1.0, -1.2, 0.6)),
}


def simulated(pair: Filter, c: float, k: float, steps: int) -> float:
    """Return the size of a weight after ``steps`` of the recursion, entry by entry."""
    num, den = pair
    x, gradients, before = 1.0, [0.0] * len(num), [0.0] * len(den)
    largest = 0.0
    for step in range(steps):
        gradients = [k * x, *gradients[:-1]]
        u = sum(b * g for b, g in zip(num, gradients, strict=True))
        u -= sum(a * v for a, v in zip(den[1:], before, strict=False))
        before = [u, *before[:-1]]
        x = c * x - u
        if step >= steps - 400:
            largest = max(largest, abs(x))
    return largest


@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_follow_from_the_filter(seed: int) -> None:
    """Catches a term of a closed form, a convention of the coefficients, and a wrong crossing: heavy
    ball, Nesterov, dampening, shares of the momentum, coupled and decoupled decay at random.
    """
    random = np.random.default_rng(seed)
    for _ in range(15):
        nesterov = bool(random.random() < 0.3)
        closed = LinearStep(
            lr=float(random.uniform(0.01, 1)),
            momentum=float(random.uniform(0.01, 0.99)),
            dampening=0.0 if nesterov else float(random.uniform(-0.5, 0.95)),
            nesterov=nesterov,
            weight_decay=float(random.uniform(0, 0.5)),
            decoupled_weight_decay=float(random.choice([0.0, random.uniform(0, 1.5)])),
            momentum_share=1.0 if nesterov else float(random.uniform(0, 1)),
        )
        step = LinearStep(
            closed.lr,
            weight_decay=closed.weight_decay,
            decoupled_weight_decay=closed.decoupled_weight_decay,
            filter=closed.as_filter,
        )
        a = float(random.uniform(0.1, 0.9)) * closed.max_sharpness

        def agree(actual: float, expected: float) -> None:
            assert actual == pytest.approx(expected, rel=1e-10, abs=1e-10)

        agree(step.max_sharpness, closed.max_sharpness)
        agree(step.min_sharpness, closed.min_sharpness)
        agree(step.max_lr(closed.max_sharpness), closed.lr)
        agree(step.max_non_uniformity(0.5), closed.max_non_uniformity(0.5))
        agree(step.max_non_uniformity(0.5, a), closed.max_non_uniformity(0.5, a))
        agree(step.mean_square_radius(a, 0.1 * a), closed.mean_square_radius(a, 0.1 * a))


@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("name", FILTERS)
def test_the_crossing_is_the_first_and_the_recursion_has_it(name: str, c: float) -> None:
    """Catches a crossing that is not the first, or is sought at -1 only: the recursion itself grows
    above it, and no smaller k is unstable.
    """
    pair = FILTERS[name]
    low, high = stable_range(c, pair)
    constant, slope = matrices(c, 1.0, pair)

    def radius(k: float) -> float:
        return float(np.abs(np.linalg.eigvals(constant + k * slope)).max())

    assert radius(high) == pytest.approx(1.0, abs=1e-9)
    assert radius(high * 1.001) > 1
    assert max(radius(k) for k in np.linspace(low + 1e-3 * high, high * 0.999, 100)) < 1
    assert low == 0 if c == 1 else radius(1.001 * low) > 1
    # Slow poles take long to show: steps by the root's distance from the circle.
    for factor in (0.98, 1.02):
        steps = int(min(5_000, 400 + 10 / abs(radius(factor * high) - 1)))
        half, full = (simulated(pair, c, factor * high, n) for n in (steps // 2 + 400, steps + 400))
        assert full > half if factor > 1 else full < half


@pytest.mark.parametrize("name", FILTERS)
def test_no_noise_is_stable_at_the_ends_of_the_range(name: str) -> None:
    """Catches a singular system, or the root of a negative number, where a point is at its limit."""
    rule = UpdateRule(lr=0.1, filter=FILTERS[name])
    region, limit = StabilityRegion(rule, batch_size=4), rule.max_sharpness
    for factor in (1.0, 1 - 1e-12):
        s = rule.max_non_uniformity(4, sharpness=factor * limit)
        assert 0 <= s < 1e-4 * rule.max_non_uniformity(4)
    boundary = [s for _, s in region.boundary(9, kind="exact")]
    assert all(s >= 0 for s in boundary)
    assert max(boundary) > 0
    a_and_s = batch_sharpness_limit(rule.linear_step, 2 * limit)
    assert a_and_s == pytest.approx(limit, rel=1e-6)


def test_published_values() -> None:
    """Catches another normalisation of the averages: the values of Adan and AdEMAMix at
    their defaults, and two poles that leave the unit circle far from -1.
    """
    assert stable_range(1.0, FILTERS["Adan"])[1] == pytest.approx(23.05, abs=5e-3)
    assert stable_range(1.0, FILTERS["AdEMAMix"])[1] == pytest.approx(37.82, abs=5e-3)
    k = stable_range(1.0, FILTERS["schedule-free with momentum"])[1]
    constant, slope = matrices(1.0, 1.0, FILTERS["schedule-free with momentum"])
    roots = np.linalg.eigvals(constant + k * slope)
    assert abs(np.angle(roots[np.abs(roots).argmax()])) < 0.1
    assert np.abs(np.linalg.eigvals(constant + 0.5 * slope)).max() > 1


@pytest.mark.parametrize("name", FILTERS)
def test_the_variance_that_is_stable_in_mean_square(name: str) -> None:
    """Catches a wrong stationary variance: the recursion of second moments crosses 1 there."""
    lr, pair = 0.1, FILTERS[name]
    rule = UpdateRule(lr=lr, filter=pair)
    for share in (0.2, 0.7):
        a = share * rule.max_sharpness
        s = rule.max_non_uniformity(1, sharpness=a)
        assert mean_square_radius(a, s**2, lr, filter=pair) == pytest.approx(1.0, abs=1e-9)
        assert mean_square_radius(a, 1.02 * s**2, lr, filter=pair) > 1
    grid = np.linspace(0, rule.max_sharpness, 51)[1:-1]
    heights = [rule.max_non_uniformity(1, sharpness=float(a)) for a in grid]
    top = rule.max_non_uniformity(1)
    # Fifty points miss the top of a parabola by at most 1/2,500 of it.
    assert max(heights) <= top * (1 + 1e-12)
    assert top == pytest.approx(max(heights), rel=1e-2)
    assert (rule.max_non_uniformity(1, sharpness=1.01 * rule.max_sharpness), rule.plain) == (
        0,
        False,
    )


def test_learning_rates_of_filters() -> None:
    """Catches a limit that is inverted as if decay did not change it, and a filter taken for plain SGD
    by what uses the rule's momentum.
    """
    pair = FILTERS["complex poles"]
    for decay in (0.0, 0.2):
        rule = UpdateRule(lr=0.3, decoupled_weight_decay=decay, filter=pair)
        assert lr_at_limit(rule, rule.max_sharpness) == pytest.approx(0.3, rel=1e-10)
    heavy = UpdateRule(lr=0.1, momentum=0.9)
    heavy_filter = UpdateRule(lr=0.1, filter=((1.0,), (1.0, -0.9)))
    assert momentum_gate(heavy_filter, 1.2) == pytest.approx(momentum_gate(heavy, 1.2), rel=1e-10)
    assert heavy_filter.memory == pytest.approx(0.9)
    assert (UpdateRule(lr=0.0, filter=pair).max_sharpness, rule.min_sharpness) == (
        math.inf,
        pytest.approx(-0.2 * sum(pair[1]) / sum(pair[0])),
    )
    problem = small_network(), nn.MSELoss(), small_data()
    for pair, options in (
        (((1.0,), (1.0, -0.9)), {"momentum": 0.9}),
        (((0.1, 0.0), (1.0, -0.9)), {"momentum": 0.9, "dampening": 0.9}),
        (((1.5, -0.5), (1.0, -0.5)), {"momentum": 0.5, "nesterov": True}),
        (((1.0,), (1.0,)), {}),
    ):
        critical, expected = (
            critical_lr(*problem, batch_size=2, update_rule=UpdateRule(lr=1.0, **settings))
            for settings in ({"filter": pair}, options)
        )
        # 1 - tau has the rounding of a subtraction.
        assert critical.value == pytest.approx(expected.value, rel=1e-10)
    adan_rule = UpdateRule(lr=1.0, filter=FILTERS["Adan"])
    with pytest.raises(ValueError, match=r"filter=.*expected the step of torch\.optim\.SGD"):
        critical_lr(*problem, batch_size=2, update_rule=adan_rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": (1.0, 2.0)}, r"filter=\(1\.0, 2\.0\): expected \(num, den\)"),
        ({"filter": ((), (1.0,))}, "sequences of finite numbers"),
        ({"filter": ((1.0,), (0.0, 1.0))}, r"den\[0\] other than 0"),
        ({"filter": ((math.nan,), (1.0,))}, "finite"),
        ({"filter": "heavy ball"}, "filter='heavy ball'"),
        ({"filter": ((1.0,), (1.0, -1.0))}, "pole of size 1: expected below 1"),
        ({"filter": ((-1.0,), (1.0, -0.5))}, "multiplies constant gradients by -2"),
        ({"filter": ((1.0,), (1.0,)), "momentum": 0.9}, "filter with momentum"),
        ({"filter": ((1.0,), (1.0,)), "nesterov": True}, "in the filter alone"),
    ],
)
def test_what_is_no_filter_is_named(options: dict, message: str) -> None:
    """Catches a filter that never forgets or ascends, and two momenta at once."""
    with pytest.raises(ValueError, match=message):
        UpdateRule(lr=0.1, **options)


def test_filters_are_normalised_and_may_be_tensors() -> None:
    """Catches coefficients kept as given, which would not compare."""
    rule = UpdateRule(lr=0.1, filter=(torch.tensor([2.0]), [2, -1]))  # type: ignore[arg-type]
    assert rule.filter == ((1.0,), (1.0, -0.5))
    assert rule == UpdateRule(lr=0.1, filter=((1.0,), (1.0, -0.5)))
