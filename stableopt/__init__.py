"""Drop-in PyTorch optimizers that measure how far training stands from the edge of stability.

Swap ``torch.optim.SGD`` for :class:`stableopt.SGD`, add one line, and the training loop stays::

    opt = stableopt.SGD(model.parameters(), lr=0.1)
    opt.track(model, loss_fn, (x, y), every=50, sinks=[stableopt.TensorBoardSink("runs/demo")])
    ...
    opt.margins        # sharpness, non-uniformity, and the largest values that the step allows
"""

from stableopt import adapt, curvature, optim, plot, sinks, stability
from stableopt._version import __version__
from stableopt.adapt import (
    AdaptiveAccumulation,
    AdaptiveBatchSampler,
    StabilityController,
    StabilityLR,
    TargetRegion,
)
from stableopt.curvature import Problem
from stableopt.monitor import StabilityMonitor
from stableopt.optim import GD, LBFGS, SGD
from stableopt.sinks import JSONLinesSink, TensorBoardSink
from stableopt.stability import (
    CriticalLR,
    StabilityMargins,
    StabilityRegion,
    UpdateRule,
    critical_batch_size,
    critical_lr,
    measure,
)
from stableopt.suggest import Suggestion, Suggestions, suggest

__all__ = [
    "GD",
    "LBFGS",
    "SGD",
    "AdaptiveAccumulation",
    "AdaptiveBatchSampler",
    "CriticalLR",
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
    "__version__",
    "adapt",
    "critical_batch_size",
    "critical_lr",
    "curvature",
    "measure",
    "optim",
    "plot",
    "sinks",
    "stability",
    "suggest",
]
