"""`Diagrams` and `LayerMaps`: pictures of a run so far, drawn ever less often."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from typing import Any

from stableopt import plot
from stableopt.stability.measure.margins import StabilityMargins

__all__ = ["Diagrams", "LayerMaps"]

_MOST_POINTS = 1000  # of the trajectory, and as many measurements as TensorBoard shows

_MAPS = ("share", "ratio", "mean_curvature")


class _Drawn(abc.ABC):
    """The measurements of a run, thinned as it grows, and when to draw: at most ``most`` times."""

    def __init__(self, most: int) -> None:
        self._left = most
        # Log-spaced in measurements, up to as many as TensorBoard shows. The last diagram is kept for
        # the end of the run, whenever that is.
        scheduled = max(most - 1, 0)
        steps = max(scheduled - 1, 1)
        self._schedule = {round(_MOST_POINTS ** (k / steps)) for k in range(scheduled)}
        self._count = self._drawn = 0
        self._stride = 1
        self._points: list[StabilityMargins] = []
        self._newest = StabilityMargins()

    def _keep(self, margins: StabilityMargins) -> None:
        self._newest = margins
        if self._count % self._stride == 0:
            self._points.append(margins)
        self._count += 1
        if len(self._points) > _MOST_POINTS:
            self._points, self._stride = self._points[::2], 2 * self._stride

    @property
    def _kept(self) -> list[StabilityMargins]:
        """The measurements that are kept, and the newest."""
        return self._points if self._points[-1] is self._newest else [*self._points, self._newest]

    @property
    def due(self) -> bool:
        """Whether to draw now."""
        return self._left > 1 and self._count > self._drawn and self._count in self._schedule

    def finish(self, writer: Any) -> None:
        """Draw the last time, if that is left and would show something new."""
        if self._left and self._count > self._drawn:
            self._left = 1
            self.draw(writer)

    def draw(self, writer: Any) -> None:
        """Draw at the newest measurement."""
        self._left -= 1
        self._drawn = self._count
        self._write(writer)

    @abc.abstractmethod
    def _write(self, writer: Any) -> None:
        """Write the pictures."""


class Diagrams(_Drawn):
    """The trajectory of a run in the stability diagram."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._marks: list[tuple[float, str]] = []
        self._region: plot.Region | None = None

    def add(self, margins: StabilityMargins, region: plot.Region | None) -> None:
        """Add a point to the trajectory, if both of its quantities are known and finite."""
        pair = (margins.limited_sharpness, margins.non_uniformity)
        if self._left and not any(x is None or not math.isfinite(x) for x in pair):
            self._region = region
            self._keep(margins)

    def mark(self, step: int, record: Mapping[str, float]) -> None:
        """Mark what the record of a decision changes; other records change nothing."""
        for label in _changes(record) if self._left and "decision" in record else ():
            # A staircase is marked where it begins: its steps would hide the trajectory.
            if not self._marks or self._marks[-1][1] != label:
                self._marks.append((step, label))

    def _write(self, writer: Any) -> None:
        figure = plot.diagram(self._region, self._kept, marks=self._marks)
        step = self._newest.step
        writer.add_image("stability/diagram", plot.to_rgb(figure), step, dataformats="HWC")


class LayerMaps(_Drawn):
    """Heat maps of a run's layers."""

    def add(self, margins: StabilityMargins) -> None:
        """Add a measurement, if it has layers."""
        if self._left and margins.layers is not None:
            self._keep(margins)

    def _write(self, writer: Any) -> None:
        newest = self._newest.layers
        assert newest is not None
        for column in _MAPS:
            if all(value is None for value in newest.column(column)):
                continue
            pixels = plot.to_rgb(plot.layers(self._kept, column))
            tag = f"stability/layers_{column}"
            writer.add_image(tag, pixels, self._newest.step, dataformats="HWC")


def _changes(record: Mapping[str, float]) -> Iterator[str]:
    """Yield what a decision changes, such as ``"lr up"``.

    >>> list(_changes({"decision": 1.0, "batch_size_from": 8.0, "batch_size_to": 4.0}))
    ['batch size down']
    """
    for key, new in record.items():
        name = key.removesuffix("_to")
        old = record.get(f"{name}_from", new)
        if name != key and old != new:
            yield f"{name.replace('_', ' ')} {'up' if new > old else 'down'}"
