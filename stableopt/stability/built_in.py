"""Registers the library's own quantities, in the order of measurement.

A quantity may use the results of those before it: ``layers`` and the limit of the batch sharpness use
the sharpness.
"""

from stableopt.stability.along_step.quantities import ALONG_STEP
from stableopt.stability.measure.layers import LAYERS
from stableopt.stability.measure.quantities import CURVATURE
from stableopt.stability.measure.registry import register
from stableopt.stability.spectrum.quantities import SPECTRUM

__all__ = ["BUILT_IN"]

BUILT_IN = tuple(register(q) for q in (*CURVATURE, *ALONG_STEP, LAYERS, *SPECTRUM))
