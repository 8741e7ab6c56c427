"""Steering: the learning rate and the batch size towards the minima that are wanted.

Three examples::

    StabilityLR(optimizer, monitor, TargetRegion.flatter(by=2))          # a scheduler
    StabilityController(monitor, TargetRegion(sharpness=(0, 10), non_uniformity=(0, 5)), batch=sampler)
    TargetRegion(sharpness=(0, 10)).lr_for(UpdateRule.of(optimizer))     # only the number
"""

from stableopt.adapt.batch_laws import (
    BatchLaw,
    BatchMeasured,
    batch_staircase,
    keep_batch_margin,
)
from stableopt.adapt.batches import AdaptiveAccumulation, AdaptiveBatchSampler
from stableopt.adapt.controller import StabilityController
from stableopt.adapt.decision import Decision
from stableopt.adapt.laws import Law, Measured, State, gated_staircase, keep_margin, new_state
from stableopt.adapt.scheduler import StabilityLR
from stableopt.adapt.target import TargetRegion

__all__ = [
    "AdaptiveAccumulation",
    "AdaptiveBatchSampler",
    "BatchLaw",
    "BatchMeasured",
    "Decision",
    "Law",
    "Measured",
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
