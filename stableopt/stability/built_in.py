"""Registers the library's own quantities, in the order of measurement.

A quantity may use the results and the cached passes of those before it: the spectra know whether their
operator's largest eigenvalue is known.
"""

from stableopt.stability.along_step.quantities import ALONG_STEP
from stableopt.stability.measure.layers import LAYERS
from stableopt.stability.measure.quantities import CURVATURE
from stableopt.stability.measure.registry import register
from stableopt.stability.spectrum.quantities import SPECTRUM

__all__ = ["BUILT_IN"]

BUILT_IN = tuple(register(q) for q in (*CURVATURE, *ALONG_STEP, LAYERS, *SPECTRUM))
