"""Linear stability: update rules, their limits, and measured margins."""

from stableopt.stability.along_step.critical_sharpness import CriticalSharpness, critical_sharpness
from stableopt.stability.built_in import BUILT_IN as _BUILT_IN  # noqa: F401 registers quantities
from stableopt.stability.layers.table import Layer, Layers
from stableopt.stability.mean_square.critical_lr import CriticalLR, critical_batch_size, critical_lr
from stableopt.stability.mean_square.theorem1 import SecondMomentExcess
from stableopt.stability.measure.batch_sharpness import (
    BatchSharpness,
    batch_sharpness,
    batch_sharpness_limit,
)
from stableopt.stability.measure.generalised_sharpness import (
    GeneralisedSharpness,
    generalised_sharpness,
)
from stableopt.stability.measure.largest_batch_sharpness import (
    LargestBatchSharpness,
    largest_batch_sharpness,
)
from stableopt.stability.measure.margins import EdgeSplit, StabilityMargins
from stableopt.stability.measure.measure import measure
from stableopt.stability.measure.measurement import Measurement, QuantityResult
from stableopt.stability.measure.registry import QUANTITIES, Chart, Quantity, register
from stableopt.stability.region import StabilityRegion
from stableopt.stability.rules import readers
from stableopt.stability.rules.limits import (
    LinearStep,
    max_non_uniformity,
    max_sharpness,
    mean_square_radius,
    min_sharpness,
    noise_factor,
)
from stableopt.stability.rules.norms import (
    NewtonSchulzNorm,
    NormedStep,
    SignNorm,
    SpectralNorm,
    StepNorm,
)
from stableopt.stability.rules.preconditioner import (
    DiagonalPreconditioner,
    MatrixPreconditioner,
    StepPreconditioner,
    UnknownPreconditioner,
    UnknownStep,
)
from stableopt.stability.rules.update_rule import UpdateRule
from stableopt.stability.spectrum.zeroth_order import ZerothOrderLR, zeroth_order_lr

__all__ = [
    "QUANTITIES",
    "BatchSharpness",
    "Chart",
    "CriticalLR",
    "CriticalSharpness",
    "DiagonalPreconditioner",
    "EdgeSplit",
    "GeneralisedSharpness",
    "LargestBatchSharpness",
    "Layer",
    "Layers",
    "LinearStep",
    "MatrixPreconditioner",
    "Measurement",
    "NewtonSchulzNorm",
    "NormedStep",
    "Quantity",
    "QuantityResult",
    "SecondMomentExcess",
    "SignNorm",
    "SpectralNorm",
    "StabilityMargins",
    "StabilityRegion",
    "StepNorm",
    "StepPreconditioner",
    "UnknownPreconditioner",
    "UnknownStep",
    "UpdateRule",
    "ZerothOrderLR",
    "batch_sharpness",
    "batch_sharpness_limit",
    "critical_batch_size",
    "critical_lr",
    "critical_sharpness",
    "generalised_sharpness",
    "largest_batch_sharpness",
    "max_non_uniformity",
    "max_sharpness",
    "mean_square_radius",
    "measure",
    "min_sharpness",
    "noise_factor",
    "readers",
    "register",
    "zeroth_order_lr",
]
