"""Target regions, and the learning rate and batch size that theory gives for them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stableopt import StabilityMargins, TargetRegion, UpdateRule
from stableopt.steering.target import at_lr, lr_at_limit

RULES = [
    UpdateRule(lr=0.3),
    UpdateRule(lr=0.3, momentum=0.9),
    UpdateRule(lr=0.3, momentum=0.9, dampening=0.5, weight_decay=0.01),
    UpdateRule(lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1),
    UpdateRule(lr=0.3, group_lrs=(0.3, 0.1)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("sharpness", [0.5, 4.0, 300.0])
def test_the_rate_is_the_one_whose_limit_is_the_target(rule: UpdateRule, sharpness: float) -> None:
    """Catches a formula of plain SGD that is used for momentum, decay or groups."""
    lr = TargetRegion(sharpness=(0, sharpness)).lr_for(rule)
    # Two divisions: a few units in the last place, more where the decay cancels.
    assert at_lr(rule, lr).max_sharpness == pytest.approx(sharpness, rel=1e-12)


def test_groups_keep_their_ratios() -> None:
    """Catches rates of groups that are left where they were."""
    assert at_lr(RULES[-1], 0.6).group_lrs == pytest.approx((0.6, 0.2), rel=1e-15)
    assert at_lr(RULES[0], 0.6).group_lrs == ()


def test_the_rate_comes_from_the_target_alone() -> None:
    """Catches a rate that depends on the present rate, as that of a law on measurements would."""
    target = TargetRegion(sharpness=(2.0, 8.0))
    assert {target.lr_for(UpdateRule(lr=lr)) for lr in (0.01, 0.25, 7.0)} == {0.25}
    # Where only a lower bound is named the limit belongs there: sharpness rises up to it.
    assert TargetRegion(sharpness=(8.0, None)).lr_for(UpdateRule(lr=1.0)) == 0.25
    assert TargetRegion(non_uniformity=(0, 1.0)).lr_for(UpdateRule(lr=0.7)) == 0.7


@pytest.mark.parametrize("rule", RULES[:3], ids=str)
@pytest.mark.parametrize("s", [0.7, 3.0, 20.0, 400.0])
@pytest.mark.parametrize("n", [1, 2, 100, 60_000])
def test_the_batch_size_is_the_last_one_that_forbids(rule: UpdateRule, s: float, n: int) -> None:
    """Catches rounding in the wrong direction, and the formula for infinite n.

    The oracle evaluates the limits at neighbouring batch sizes.
    """
    size = TargetRegion(non_uniformity=(0, s)).batch_size_for(rule, n)
    assert 1 <= size <= n
    limit = rule.max_non_uniformity(size, n)
    # A batch size that is whole but for 1e-9 of itself counts as whole.
    assert limit <= s * (1 + 1e-8) or size == 1
    assert size == n or rule.max_non_uniformity(size + 1, n) > s
    keeping = TargetRegion(non_uniformity=(s, None)).batch_size_for(rule, n)
    assert size <= keeping <= size + 1
    assert keeping == n or rule.max_non_uniformity(keeping, n) >= s * (1 - 1e-8)


def test_the_batch_size_at_a_sharpness_is_that_of_the_half_ellipse() -> None:
    """Catches the box's limit used instead of the half-ellipse's: p = (2/(lr a) - 1) a^2/s^2."""
    lr, a, s, n = 0.5, 3.0, 5.0, 1000
    p = (2 / (lr * a) - 1) * a**2 / s**2
    expected = math.floor(n / (1 + p * (n - 1)))
    target = TargetRegion(non_uniformity=(0, s))
    assert target.batch_size_for(lr, n, sharpness=a) == expected == 8
    # Beyond 2/lr nothing is stable at any noise; without a bound any batch size will do.
    assert target.batch_size_for(lr, n, sharpness=4.1) == n
    assert TargetRegion(sharpness=(0, 1.0)).batch_size_for(lr, n) == n


def test_relative_regions_are_resolved_by_what_is_measured() -> None:
    """Catches an inverted factor, and bounds on a quantity that the target leaves free."""
    now = StabilityMargins(sharpness=8.0, non_uniformity=6.0)
    open_end = (0.0, math.inf)
    for target, sharpness, non_uniformity in (
        (TargetRegion.flatter(by=2), (0.0, 4.0), open_end),
        (TargetRegion.sharper(by=2), (16.0, math.inf), open_end),
        (TargetRegion.more_uniform(by=3), open_end, (0.0, 2.0)),
    ):
        resolved = target.resolve(now)
        assert (resolved.sharpness, resolved.non_uniformity) == (
            sharpness,
            pytest.approx(non_uniformity),
        )
        assert resolved.unit == "absolute"
        assert resolved.resolve(StabilityMargins()) == resolved
        with pytest.raises(ValueError, match="resolve"):
            target.lr_for(UpdateRule(lr=0.1))
        with pytest.raises(ValueError, match=r"is None: expected a positive measured value"):
            target.resolve(StabilityMargins(failure="not finite"))


def test_a_margin_is_a_share_of_the_limit() -> None:
    """Catches a share of the limit used as a sharpness."""
    target = TargetRegion.within_limits(0.8)
    assert target.share == 0.8
    assert target.resolve(StabilityMargins(sharpness=8.0)) is target
    assert target.contains(0.7, 0.8)
    assert not target.contains(0.7, 0.81)
    assert TargetRegion(sharpness=(0, 1)).share is None
    assert TargetRegion(non_uniformity=(0, 0.5), unit="limit").share == math.inf
    for bounds in ((0.1, 0.5), (0.0, 1.0), (0.1, None)):
        for name in ("sharpness", "non_uniformity"):
            with pytest.raises(
                ValueError, match=f"^{name}=.*expected an upper bound below 1, and no"
            ):
                TargetRegion(**{name: bounds}, unit="limit")
    with pytest.raises(ValueError, match="lr_for of a share of the limits: expected"):
        target.lr_for(UpdateRule(lr=0.1))


def test_contains_includes_the_ends_and_not_the_unknown() -> None:
    """Catches a bounded quantity that was not measured and counts as inside."""
    target = TargetRegion(sharpness=(2, 4))
    assert target.contains(2, None)
    assert target.contains(4, 1e9)
    assert not target.contains(4.01)
    assert not target.contains(None, 1.0)
    assert not target.contains(math.nan, 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "expected a bound in at least one"),
        ({"sharpness": (None, None)}, "expected a bound"),
        ({"sharpness": (5, 4)}, r"sharpness=\(5, 4\)"),
        ({"sharpness": (-1, 4)}, "0 ≤ low ≤ high"),
        ({"sharpness": (0, 0)}, "0 < high"),
        ({"sharpness": 4.0}, r"sharpness=4.0: expected \(low, high\)"),
        ({"non_uniformity": (math.nan, 4)}, "non_uniformity="),
        ({"non_uniformity": ("a", 4)}, "non_uniformity="),
        ({"non_uniformity": (math.inf, None)}, "non_uniformity="),
        ({"sharpness": (0, 1), "unit": "percent"}, "unit='percent'"),
    ],
)
def test_bad_regions_are_refused(arguments: dict[str, Any], says: str) -> None:
    """Catches a region that is empty or has no bound."""
    with pytest.raises(ValueError, match=says):
        TargetRegion(**arguments)


@pytest.mark.parametrize("by", [1.0, 0.5, -2, math.nan, "2", True])
def test_factors_are_above_one(by: Any) -> None:
    """Catches ``flatter(by=0.5)``, which would be sharper."""
    for make in (TargetRegion.flatter, TargetRegion.sharper, TargetRegion.more_uniform):
        with pytest.raises(ValueError, match="by="):
            make(by=by)


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_margins_are_between_zero_and_one(share: float) -> None:
    """Catches a share given in percent: 80 for 0.8."""
    with pytest.raises(ValueError, match="share="):
        TargetRegion.within_limits(share)


def test_it_is_said_in_words() -> None:
    """Catches messages to the user that show infinities or tuples."""
    assert str(TargetRegion(sharpness=(0, 4))) == "sharpness up to 4"
    assert str(TargetRegion.sharper(by=2)) == "sharpness from 2 of the present"
    text = "sharpness from 1 to 4, non-uniformity up to 2"
    assert str(TargetRegion(sharpness=(1, 4), non_uniformity=(0, 2))) == text


def test_the_limit_needs_a_positive_sharpness() -> None:
    """Catches a negative rate."""
    with pytest.raises(ValueError, match="sharpness=-1"):
        lr_at_limit(UpdateRule(lr=1.0), -1.0)


def test_it_is_drawn_with_its_bounds() -> None:
    """Catches an axis that ends before the target, and an open end that is drawn as a side."""
    figure = TargetRegion(sharpness=(2, 10), non_uniformity=(0, None)).plot([(3.0, 4.0)])
    (axes,) = figure.axes
    assert axes.get_xlim()[1] > 10
    (line,) = [line for line in axes.lines if line.get_label() == "target"]
    x, y = line.get_data()
    assert sorted(set(x)) == [2, 10]
    assert max(y) > axes.get_ylim()[1]
    assert min(y) < axes.get_ylim()[0]
    with pytest.raises(ValueError, match="plot of a share of the limits"):
        TargetRegion.within_limits(0.5).plot()
