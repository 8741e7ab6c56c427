"""`short_difference`: the difference between kinks."""

from __future__ import annotations

import math

import torch

from stableopt.curvature.problem.derivatives.short_differences import (
    generic_point,
    short_difference,
)


def test_kinks_beyond_the_shortest_steps_do_not_matter() -> None:
    """Catches the slope over several pieces, on which the longer steps agree by chance."""

    def pieces(h: float) -> float:
        far = max(abs(h) - 5e-8, 0.0)
        return h + 0.3 * math.copysign(far, h)

    difference = short_difference(pieces, 1.0, torch.float64)
    assert difference is not None
    assert abs(difference.value - 1) < 1e-6  # rounding of 1e-16 over steps of 1e-8 or more


def test_noise_and_jumps_say_nothing() -> None:
    """Catches a slope made from noise or from a jump at the point."""
    chance = torch.Generator().manual_seed(0)

    def noisy(h: float) -> torch.Tensor:
        return h + torch.randn(50, generator=chance, dtype=torch.float64) * 1e-6

    assert short_difference(noisy, 1.0, torch.float64) is None
    assert short_difference(lambda h: float(h > 0), 1.0, torch.float64) is None
    assert short_difference(lambda h: h, 1.0, torch.float64, noise=1.0) is None


def test_the_derivative_of_a_staircase_is_not_confirmed_by_its_ramp() -> None:
    """Catches a gradient that is passed straight through a rounding, and found right over long steps."""

    def stairs(h: float) -> float:
        return math.floor(1e4 * h + 0.5) / 1e4

    difference = short_difference(stairs, 1.0, torch.float64, expected=1.0)
    assert difference is None or difference.value == 0.0


def test_a_right_derivative_takes_one_difference() -> None:
    """Catches differences beyond the one that suffices, and a step within the noise."""
    steps: list[float] = []

    def smooth(h: float) -> float:
        steps.append(abs(h))
        return math.sin(h)

    difference = short_difference(smooth, 1.0, torch.float64, noise=1e-9, expected=1.0)
    assert difference is not None
    assert steps == [1e-6, 1e-6]  # a shorter one would leave 1 % of noise
    # A wrong expected value is not confirmed, and the right one is found all the same.
    difference = short_difference(smooth, 1.0, torch.float64, expected=0.9)
    assert difference is not None
    assert abs(difference.value - 1) < 1e-6


def test_a_generic_point_moves_zeros_too() -> None:
    """Catches a bias that stays at zero, and with it a blank part of an image on its kink."""
    weight, bias = torch.full((4,), 2.0), torch.zeros(3)
    moved = generic_point([weight, bias])
    assert bool((moved[1] != 0).all())
    assert float((moved[0].detach() - weight).abs().max()) < 0.01
