"""The theory: update rules, their limits, and the margins that are left."""

from stableopt.stability.limits import (
    max_non_uniformity,
    max_sharpness,
    mean_square_radius,
    noise_factor,
)
from stableopt.stability.margins import Measurement, StabilityMargins, measure
from stableopt.stability.mean_square import SecondMomentBound
from stableopt.stability.region import StabilityRegion
from stableopt.stability.update_rule import UpdateRule

__all__ = [
    "Measurement",
    "SecondMomentBound",
    "StabilityMargins",
    "StabilityRegion",
    "UpdateRule",
    "max_non_uniformity",
    "max_sharpness",
    "mean_square_radius",
    "measure",
    "noise_factor",
]
