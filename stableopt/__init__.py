"""Drop-in PyTorch optimizers that measure how far training stands from the edge of stability.

Swap ``torch.optim.SGD`` for :class:`stableopt.SGD` and add one line; the training loop stays as it is::

    opt = stableopt.SGD(model.parameters(), lr=0.1)
    opt.track(model, loss_fn, (x, y), every=50, sinks=[stableopt.TensorBoardSink("runs/demo")])
    ...
    opt.margins        # sharpness, non-uniformity, and their largest stable values
"""

import importlib
from typing import TYPE_CHECKING, Any

from stableopt import curvature, optim, plot, sinks, stability
from stableopt._support.deprecation import warn_renamed
from stableopt._version import __version__
from stableopt.curvature import Problem
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.optim import GD, SGD
from stableopt.sinks import ConsoleSink, JSONLinesSink, TensorBoardSink, WandbSink
from stableopt.stability import (
    CriticalLR,
    CriticalSharpness,
    StabilityMargins,
    StabilityRegion,
    UpdateRule,
    critical_batch_size,
    critical_lr,
    critical_sharpness,
    measure,
)
from stableopt.suggestions import Suggestion, Suggestions, suggest

if TYPE_CHECKING:
    from stableopt import steering
    from stableopt.optim import LBFGS
    from stableopt.recorder import AlarmRules, FlightRecorder
    from stableopt.stability.simulated.almost_sure import almost_sure_critical_lr
    from stableopt.stability.simulated.bracketed import BracketedLR
    from stableopt.stability.simulated.reshuffled import reshuffled_critical_lr
    from stableopt.steering import (
        AdaptiveAccumulation,
        AdaptiveBatchSampler,
        StabilityController,
        StabilityLR,
        TargetRegion,
    )

__all__ = [
    "GD",
    "LBFGS",
    "SGD",
    "AdaptiveAccumulation",
    "AdaptiveBatchSampler",
    "AlarmRules",
    "BracketedLR",
    "ConsoleSink",
    "CriticalLR",
    "CriticalSharpness",
    "FlightRecorder",
    "JSONLinesSink",
    "Problem",
    "StabilityController",
    "StabilityLR",
    "StabilityMargins",
    "StabilityMonitor",
    "StabilityRegion",
    "Suggestion",
    "Suggestions",
    "TargetRegion",
    "TensorBoardSink",
    "UpdateRule",
    "WandbSink",
    "__version__",
    "almost_sure_critical_lr",
    "critical_batch_size",
    "critical_lr",
    "critical_sharpness",
    "curvature",
    "measure",
    "optim",
    "plot",
    "reshuffled_critical_lr",
    "sinks",
    "stability",
    "steering",
    "suggest",
]

_ON_DEMAND = {
    "LBFGS": "optim",
    "AdaptiveAccumulation": "steering",
    "AdaptiveBatchSampler": "steering",
    "AlarmRules": "recorder",
    "BracketedLR": "stability.simulated.bracketed",
    "FlightRecorder": "recorder",
    "StabilityController": "steering",
    "StabilityLR": "steering",
    "TargetRegion": "steering",
    "almost_sure_critical_lr": "stability.simulated.almost_sure",
    "reshuffled_critical_lr": "stability.simulated.reshuffled",
}
"""Names imported on first access, with their modules: a fifth of all modules."""


if not TYPE_CHECKING:  # otherwise every misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "ReshuffledLR":
            warn_renamed("stableopt.ReshuffledLR", "stableopt.BracketedLR")
            name = "BracketedLR"
        if name in ("steering", "adapt"):  # `adapt` is the former name, and warns
            return importlib.import_module(f"stableopt.{name}")
        if name in _ON_DEMAND:
            return getattr(importlib.import_module(f"stableopt.{_ON_DEMAND[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
