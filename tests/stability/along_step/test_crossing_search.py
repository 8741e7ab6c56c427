"""The search for the first rise of a loss along a line."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from stableopt.stability.along_step.crossing_search import first_rise

TOL = 1 / 16

LOSSES: dict[str, tuple[Callable[[float], float], float, float]] = {
    "quadratic": (lambda t: (t - 1) ** 2, -2.0, 2.0),
    "cubic": (lambda t: -t + 0.3 * t**2 + 0.1 * t**3, -1.0, (math.sqrt(0.49) - 0.3) / 0.2),
    "flat, then steep": (lambda t: -t + 0.1 * t**8, -1.0, 10 ** (1 / 7)),
    "infinite behind": (lambda t: -t if t < 2 else math.inf, -1.0, 2.0),
    "not a number behind": (lambda t: -t if t < 2 else math.nan, -1.0, 2.0),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("slope_known", [False, True], ids=["", "with slope"])
def test_the_bracket_holds_the_first_crossing(name: str, slope_known: bool) -> None:
    """Catches a bracket next to the crossing, too wide a one, and a line that is followed for long.

    The oracle is the closed form; plain doubling and bisection from the same starts takes up to 24.
    """
    loss, slope, crossing = LOSSES[name]
    for start in crossing * np.geomspace(0.05, 20, 41):
        rise = first_rise(
            loss, loss(0), start, tol=TOL, passes=30, slope=slope if slope_known else None
        )
        # Rounding of the loss at the crossing itself, relative to its slope there.
        assert rise.low <= crossing * (1 + 1e-12)
        assert crossing <= rise.high * (1 + 1e-12)
        assert 1 - rise.low / rise.high < TOL
        assert rise.low <= rise.share <= rise.high
        if name == "quadratic":
            assert rise.share == pytest.approx(crossing, rel=1e-9)
            assert rise.passes <= 7
        if 0.9 < start / crossing < 1.1 and name in ("quadratic", "cubic"):
            assert rise.passes <= 4


def test_losses_that_never_cross() -> None:
    """Catches a search without an end, and a result that claims a crossing."""
    uphill = first_rise(lambda t: t, 0.0, 1.0, tol=TOL, passes=24)
    assert (uphill.low, uphill.passes) == (0.0, 4)
    downhill = first_rise(lambda t: -t, 0.0, 1.0, tol=TOL, passes=10)
    assert (downhill.high, downhill.passes) == (math.inf, 10)
    assert downhill.share == downhill.low > 100
    broken = first_rise(lambda t: math.nan, 0.0, 1.0, tol=TOL, passes=24)
    assert (broken.low, broken.passes) == (0.0, 24)


@pytest.mark.parametrize("distance", [1e-4, 1e-2, 100.0])
def test_few_losses_find_a_crossing_far_away(distance: float) -> None:
    """Catches a search that doubles its way to the crossing. A network's loss rises by powers of
    the distance, then as a line.
    """

    def loss(t: float) -> float:
        return -t + t**1.6 / (1 + t / 30) ** 0.6 + 0.2 * t**2 / (1 + t)

    slopes = np.geomspace(0.1, 2, 100_000)
    crossing = slopes[[loss(t) > 0 for t in slopes].index(True)]
    rise = first_rise(loss, 0.0, distance * crossing, tol=TOL, passes=6, slope=-1.0)
    assert rise.low <= crossing <= rise.high
    assert 1 - rise.low / rise.high < TOL
    assert rise.passes <= 6
    # One trial fewer leaves a wider bracket, which holds it all the same.
    one_less = first_rise(
        loss, 0.0, distance * crossing, tol=TOL, passes=rise.passes - 1, slope=-1.0
    )
    assert one_less.low <= crossing <= one_less.high
