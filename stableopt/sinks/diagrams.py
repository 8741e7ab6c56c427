"""`Diagrams` and `LayerMaps`: images of a run for TensorBoard, at log-spaced measurements."""

from __future__ import annotations

import abc
import math
from typing import Any

from stableopt import plot
from stableopt.stability.measure.margins import StabilityMargins

__all__ = ["Diagrams", "LayerMaps"]

_MOST_POINTS = 1000  # points of the trajectory; TensorBoard shows as many measurements

_MAPS = ("share", "ratio", "mean_curvature")


class _Images(abc.ABC):
    """The measurements of a run, thinned as it grows, and a schedule of at most ``most`` images."""

    def __init__(self, most: int) -> None:
        self._left = most
        # Log-spaced up to the number of measurements that TensorBoard shows. The last image is
        # reserved for the end of the run.
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
        """The kept measurements, with the newest at the end."""
        return self._points if self._points[-1] is self._newest else [*self._points, self._newest]

    @property
    def due(self) -> bool:
        """Whether an image is scheduled for the newest measurement."""
        return self._left > 1 and self._count > self._drawn and self._count in self._schedule

    def finish(self, writer: Any) -> None:
        """Draw the last image, unless it is drawn already or would show nothing new."""
        if self._left and self._count > self._drawn:
            self._left = 1
            self.draw(writer)

    def draw(self, writer: Any) -> None:
        """Draw the measurements up to the newest."""
        self._left -= 1
        self._drawn = self._count
        self._write(writer)

    @abc.abstractmethod
    def _write(self, writer: Any) -> None:
        """Write the images."""


class Diagrams(_Images):
    """The trajectory of a run in the stability diagram."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._marks: list[tuple[float, str]] = []
        self._region: plot.Region | None = None

    def add(self, margins: StabilityMargins, region: plot.Region | None) -> None:
        """Add a point to the trajectory, if both of its quantities are known and finite."""
        pair = (margins.limited_sharpness, margins.non_uniformity)
        if self._left and all(value is not None and math.isfinite(value) for value in pair):
            self._region = region
            self._keep(margins)

    def mark(self, step: int, label: str) -> None:
        """Mark a decision on the trajectory."""
        # Of a staircase only the first step has a mark: more would hide the trajectory.
        if self._left and (not self._marks or self._marks[-1][1] != label):
            self._marks.append((step, label))

    def _write(self, writer: Any) -> None:
        figure = plot.diagram(self._region, self._kept, marks=self._marks)
        step = self._newest.step
        writer.add_image("stability/diagram", plot.to_rgb(figure), step, dataformats="HWC")


class LayerMaps(_Images):
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
