"""Deprecated alias of :mod:`stableopt.steering`."""

import warnings

from stableopt.steering import *  # noqa: F403
from stableopt.steering import __all__ as __all__

warnings.warn(
    "stableopt.adapt is deprecated and will be removed in 1.0: use stableopt.steering",
    DeprecationWarning,
    stacklevel=2,
)
