"""Margins of runs that the TensorBoard sink writes, and what TensorBoard reads back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from stableopt import StabilityMargins, TensorBoardSink

LAYOUT_TAG = "custom_scalars__config__"


def read(folder: Path) -> EventAccumulator:
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def steps_of(events: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in events.Scalars(tag)]


def layout_of(events: EventAccumulator) -> layout_pb2.Layout:
    (event,) = events.Tensors(LAYOUT_TAG)
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def series_of(events: EventAccumulator) -> dict[str, tuple[str, str, str]]:
    """Return value, lower and upper tag of every chart by title."""
    return {
        chart.title: (series.value, series.lower, series.upper)
        for category in layout_of(events).category
        for chart in category.chart
        for series in chart.margin.series
    }


def gd(step: int, **changes: Any) -> StabilityMargins:
    known: dict[str, Any] = {
        "lr": 0.1,
        "batch_size": 100,
        "dataset_size": 100,
        "loss": 0.5,
        "sharpness": 18.0 + 0.01 * step,
        "sharpness_limit": 20.0,
        "non_uniformity": 30.0 + 0.01 * step,
        "non_uniformity_limit": math.inf,
    }
    return StabilityMargins(step=step, **{**known, **changes})


def sgd(step: int, **changes: Any) -> StabilityMargins:
    return gd(
        step, **{"batch_size": 4, "dataset_size": None, "non_uniformity_limit": 20.0, **changes}
    )


def adam(step: int, **changes: Any) -> StabilityMargins:
    own = {
        "sharpness_limit": None,
        "preconditioned_sharpness": 300.0 + step,
        "preconditioned_sharpness_limit": 380.0,
    }
    return sgd(step, **{**own, **changes})


def failed(step: int) -> StabilityMargins:
    return sgd(step, loss=None, sharpness=None, non_uniformity=None, failure="the loss is nan")


def write(folder: Path, run: Iterable[StabilityMargins], **options: Any) -> EventAccumulator:
    sink = TensorBoardSink(folder, **options)
    for margins in run:
        sink(margins.step, margins.record())
    sink.close()
    return read(folder)
