"""Models, losses and batches that a measurement meets in the wild, each as small as it can be.

Every builder is called under a default dtype of float64 with a fixed seed, so that two calls give the
same :class:`Setting`: one to measure, and one for the reference, which may change it freely.
Importing a module here enters its builders in the tables.
"""

from hostile_models import (
    attention,
    batches,
    modules,
    normalisation,
    parameters,
    refused,
    sequences,
)
from hostile_models.blocks import MSE, mlp, pair
from hostile_models.execution import Autocast, Checkpointed
from hostile_models.setting import MEASURED, REFUSED, Setting

__all__ = [
    "MEASURED",
    "MSE",
    "REFUSED",
    "Autocast",
    "Checkpointed",
    "Setting",
    "attention",
    "batches",
    "mlp",
    "modules",
    "normalisation",
    "pair",
    "parameters",
    "refused",
    "sequences",
]
