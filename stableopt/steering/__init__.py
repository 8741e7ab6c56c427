"""Steering: control of learning rate and batch size that makes minima outside a target region unstable.

Three examples::

    StabilityLR(optimizer, monitor, TargetRegion.flatter(by=2))          # a scheduler
    StabilityController(monitor, TargetRegion(sharpness=(0, 10), non_uniformity=(0, 5)), batch=sampler)
    TargetRegion(sharpness=(0, 10)).lr_for(UpdateRule.from_optimizer(optimizer))  # only the number
"""

from stableopt._support.deprecation import renamed_names
from stableopt.steering.batch_laws import (
    BatchLaw,
    BatchMeasured,
    batch_staircase,
    keep_batch_margin,
)
from stableopt.steering.controller import StabilityController
from stableopt.steering.decision import Decision
from stableopt.steering.law_state import State, new_state
from stableopt.steering.lr_laws import Law, LRMeasured, gated_staircase, keep_margin
from stableopt.steering.samplers import AdaptiveAccumulation, AdaptiveBatchSampler
from stableopt.steering.scheduler import StabilityLR
from stableopt.steering.target import TargetRegion

__all__ = [
    "AdaptiveAccumulation",
    "AdaptiveBatchSampler",
    "BatchLaw",
    "BatchMeasured",
    "Decision",
    "LRMeasured",
    "Law",
    "StabilityController",
    "StabilityLR",
    "State",
    "TargetRegion",
    "batch_staircase",
    "gated_staircase",
    "keep_batch_margin",
    "keep_margin",
    "new_state",
]

__getattr__ = renamed_names(__name__, Measured="LRMeasured")
