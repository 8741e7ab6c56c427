"""
The margins of a run
====================

Gradient descent sharpens until it stands at its limit.
"""
import stableopt
from stableopt import StabilityMargins, plot
figure = plot.margins([StabilityMargins(step=t, sharpness=5.0 + t, sharpness_limit=20.0) for t in range(9)])
