"""`measured`: sharpness and non-uniformity of a network, with residuals and limits."""

from __future__ import annotations

from typing import Any

from torch import nn

import stableopt
from benchmarks.training.data import Images
from benchmarks.training.loops import mean_squared_error

__all__ = ["BOTH", "measured"]

BOTH = ("sharpness", "non_uniformity")


def measured(
    model: nn.Module,
    images: Images,
    *,
    lr: float,
    batch_size: int | None = None,
    non_uniformity: bool = True,
    sample: int | None = None,
) -> dict[str, Any]:
    """Return sharpness and non-uniformity, with relative residuals and the limits of SGD or GD.

    The non-uniformity is that of the first ``sample`` images, by default of all.
    """
    model.eval()  # for batch norm: see resnet14
    parts: list[tuple[tuple[str, ...], int | None]] = [(BOTH, None)]
    if not non_uniformity:
        parts = [(("sharpness",), None)]
    elif sample is not None:
        parts = [(("sharpness",), None), (("non_uniformity",), sample)]
    row: dict[str, Any] = {}
    for quantities, count in parts:
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x[:count], images.y[:count]),
            lr=lr,
            batch_size=batch_size or len(images.x),
            dataset_size=len(images.x),
            quantities=quantities,
            chunk_size=images.chunk_size,
            max_iter=300,
        )
        for name, measurement in margins.measurements.items():
            row[name] = getattr(margins, name)
            row[f"{name}_relative_residual"] = measurement.residual
            row[f"{name}_limit"] = getattr(margins, f"{name}_limit")
    return row
