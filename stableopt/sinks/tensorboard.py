"""Live charts in TensorBoard: margins against their limits, and the diagram now and then."""

from __future__ import annotations

import math
import os
import shlex
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stableopt import plot
from stableopt.stability import StabilityMargins, StabilityRegion, UpdateRule

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["LAYOUT", "TensorBoardSink"]

_LONGEST_TAG = 25  # the legends of the Custom Scalars dashboard have no room for more
_POINTS_SHOWN = 1000  # what TensorBoard keeps of a tag unless told otherwise
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of the float32 numbers that event files hold


class _Band(NamedTuple):
    """A chart of a value between two others: the tags, and the title."""

    title: str
    value: str
    lower: str
    upper: str


# A Margin chart is an error card unless its three tags have the very same steps. They are therefore
# written together or not at all, and where there is no limit the value is only in its plain tag,
# such as stability/non_uniformity, which has every measurement.
_CHARTS = {
    "sharpness": (
        _Band(
            "sharpness / limit",
            "stability/sharpness_ratio",
            "stability/sharp_ratio_low",
            "stability/sharp_ratio_up",
        ),
        _Band(
            "sharpness and its limit",
            "stability/sharpness_value",
            "stability/sharpness_lower",
            "stability/sharpness_upper",
        ),
    ),
    "preconditioned_sharpness": (
        _Band(
            "preconditioned sharpness / limit",
            "stability/pre_sharp_ratio",
            "stability/pre_ratio_low",
            "stability/pre_ratio_up",
        ),
        _Band(
            "preconditioned sharpness and its limit",
            "stability/pre_sharp_value",
            "stability/pre_sharp_lower",
            "stability/pre_sharp_upper",
        ),
    ),
    "non_uniformity": (
        _Band(
            "non-uniformity / limit",
            "stability/non_unif_ratio",
            "stability/nonuf_ratio_low",
            "stability/nonuf_ratio_up",
        ),
        _Band(
            "non-uniformity and its limit",
            "stability/non_unif_value",
            "stability/non_unif_lower",
            "stability/non_unif_upper",
        ),
    ),
}

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "edge of stability": {
        # TensorBoard shows the charts of a category from the last to the first.
        band.title: ["Margin", [band.value, band.lower, band.upper]]
        for bands in reversed(_CHARTS.values())
        for band in reversed(bands)
    }
}
"""The Custom Scalars dashboard, as ``SummaryWriter.add_custom_scalars`` takes it: the same for every
run, since TensorBoard merges the layouts of all runs and would show each chart that differs."""


class TensorBoardSink:
    r"""Writes measurements to TensorBoard.

    - *Custom Scalars*: sharpness, preconditioned sharpness and non-uniformity relative to their
      limits, with a band from 0.99 to 1.01, and as they are, with a band of ±1 % around the limit.
      Where there is no limit, as for the non-uniformity of full-batch gradient descent or the plain
      sharpness of an optimizer with a preconditioner, there is no band, and the value is only among
      the scalars.
    - *Scalars*: every finite number of a record, as ``stability/<name>`` of at most 25 characters
      (``non_uniformity_ratio`` is ``stability/non_unif_ratio``), and the bands.
    - *Images*: the sharpness / non-uniformity diagram, if both are measured, after the first
      measurement and then ever less often, and at the first :meth:`flush` or :meth:`close` that finds
      something new. What steering decided is marked in it.
    - *Text*: each decision and its reason, as ``stability/decisions``.

    A writer that the sink made is flushed after every record; one that was given is left to its own
    pace. TensorBoard keeps one layout a run, so a given writer must have no Custom Scalars of its own.

    Args:
        writer_or_dir: the run's directory, or a ``torch.utils.tensorboard.SummaryWriter``.
        max_diagrams: the most diagrams that are drawn; 0 for none, which does without matplotlib.
            TensorBoard keeps ten images a tag.
        announce: print :attr:`command` and :attr:`link` with the first record.

    Raises:
        ImportError: without tensorboard, or without matplotlib if there are to be diagrams.
        ValueError: if ``max_diagrams`` is negative.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = TensorBoardSink(folder, max_diagrams=0)
    ...     margins = StabilityMargins(step=50, sharpness=15.0, sharpness_limit=20.0)
    ...     sink(margins.step, margins.record())
    ...     sink.close()
    >>> sink.link
    'http://localhost:6006/#custom_scalars&_smoothingWeight=0'
    """

    link = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"
    """Where TensorBoard shows the charts, unsmoothed: smoothing would draw a value off its limit."""

    def __init__(
        self,
        writer_or_dir: SummaryWriter | str | os.PathLike[str],
        *,
        max_diagrams: int = 10,
        announce: bool = False,
    ) -> None:
        if max_diagrams < 0:
            raise ValueError(f"max_diagrams={max_diagrams}: expected at least 0")
        if max_diagrams:
            plot.require_matplotlib()
        self._owned = isinstance(writer_or_dir, (str, os.PathLike))
        if not self._owned and not hasattr(writer_or_dir, "add_custom_scalars"):
            raise TypeError(
                f"writer_or_dir={writer_or_dir!r}: expected a directory or a SummaryWriter"
            )
        self.writer: Any = _new_writer(writer_or_dir) if self._owned else writer_or_dir
        self._announce = announce
        self._records = 0
        self._names: dict[str, str] = {}
        self._diagrams = _Diagrams(max_diagrams)

    @property
    def command(self) -> str:
        """The command that shows this run."""
        return f"tensorboard --logdir {shlex.quote(str(self.writer.log_dir))}"

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Write ``record``, measured at ``step``.

        Raises:
            ValueError: if two names of the record have the same tag.
        """
        if self._records == 0:
            self.writer.add_custom_scalars(LAYOUT)
            if self._announce:
                print(f"{self.command}\n{self.link}")
        self._records += 1
        for tag, value in self._scalars(record).items():
            self.writer.add_scalar(tag, value, int(step))
        self._diagrams.add(int(step), record)
        if self._diagrams.due:
            self._diagrams.draw(self.writer)
        if self._owned:
            self.writer.flush()
        if self._records == _POINTS_SHOWN + 1:
            warnings.warn(
                f"the run has more than {_POINTS_SHOWN:,} measurements, of which TensorBoard shows a"
                f" random {_POINTS_SHOWN:,}; to see all: {self.command} --samples_per_plugin"
                " scalars=0",
                UserWarning,
                stacklevel=2,
            )

    def note(self, step: int, text: str) -> None:
        """Write ``text``, what was decided at ``step`` and why."""
        self.writer.add_text("stability/decisions", text, int(step))

    def flush(self) -> None:
        """Write everything to disk; the first time with a diagram of what is newest."""
        self._diagrams.finish(self.writer)
        self.writer.flush()

    def close(self) -> None:
        """Flush, and close the writer if the sink made it."""
        self.flush()
        if self._owned:
            self.writer.close()

    def __repr__(self) -> str:
        return f"TensorBoardSink({str(self.writer.log_dir)!r})"

    def _scalars(self, record: Mapping[str, float]) -> dict[str, float]:
        """Return the scalars of ``record`` by tag, all of them finite."""
        scalars: dict[str, float] = {}
        for name, value in record.items():
            # Ratios with a chart come with their bands.
            if name.removesuffix("_ratio") in _CHARTS and name.endswith("_ratio"):
                continue
            if abs(value) <= _LARGEST:
                scalars[self._tag(name)] = value
        for name, charts in _CHARTS.items():
            limit = record.get(f"{name}_limit", math.inf)
            scalars.update(_bands(record.get(name, math.nan), limit, *charts))
        return scalars

    def _tag(self, name: str) -> str:
        tag = _short(name)
        if (other := self._names.setdefault(tag, name)) != name:
            raise ValueError(f"record: {other!r} and {name!r} have the same tag {tag!r}")
        return tag


def _new_writer(directory: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardSink needs tensorboard: pip install stableopt[tensorboard]"
        ) from error
    return SummaryWriter(os.fspath(directory))


def _short(name: str) -> str:
    """Return the tag of ``name``: as it is if it fits, else with its words cut to one length.

    >>> _short("sharpness"), _short("non_uniformity_limit"), _short("preconditioned_sharpness")
    ('stability/sharpness', 'stability/non_unif_limit', 'stability/pre_sharpness')
    """
    room = _LONGEST_TAG - len("stability/")
    if len(name) > room:
        name = name.replace("non_uniformity", "non_unif")
        name = name.replace("preconditioned_sharpness", "pre_sharpness")
    length = len(name)
    words = name.split("_")
    while len(name) > room and length > 1:
        length -= 1
        name = "_".join(word[:length] for word in words)
    return f"stability/{name[:room]}"


def _bands(value: float, limit: float, ratio: _Band, raw: _Band) -> dict[str, float]:
    """Return both charts' scalars; none where a number would not be one, or a band not positive."""
    if not (math.isfinite(value) and 0 < limit < math.inf):
        return {}
    scalars = {
        ratio.value: value / limit,
        ratio.lower: 0.99,
        ratio.upper: 1.01,
        raw.value: value,
        raw.lower: 0.99 * limit,
        raw.upper: 1.01 * limit,
    }
    fits = all(abs(number) <= _LARGEST for number in scalars.values())
    return scalars if fits and scalars[raw.lower] >= _SMALLEST else {}


class _Diagrams:
    """The trajectory, thinned as it grows, and when to draw it: at most so many times."""

    def __init__(self, most: int) -> None:
        self._left = most
        # Log-spaced in measurements, up to as many as TensorBoard shows; the last one is kept for
        # the end, wherever that is.
        scheduled = max(most - 1, 0)
        steps = max(scheduled - 1, 1)
        self._schedule = {round(_POINTS_SHOWN ** (k / steps)) for k in range(scheduled)}
        self._count = self._drawn = 0
        self._stride = 1
        self._points: list[StabilityMargins] = []
        self._newest = StabilityMargins()
        self._marks: list[tuple[float, str]] = []
        self._region: plot.Region | None = None

    def add(self, step: int, record: Mapping[str, float]) -> None:
        """Take one record, if it has both quantities (with a preconditioner those that it is in), or
        is a decision.
        """
        if self._left and "decision" in record:
            self._mark(step, record)
        sharpness = record.get("preconditioned_sharpness", record.get("sharpness"))
        non_uniformity = record.get("non_uniformity")
        if not self._left or sharpness is None or non_uniformity is None:
            return
        if not (math.isfinite(sharpness) and math.isfinite(non_uniformity)):
            return
        self._newest = StabilityMargins(
            step=step, sharpness=sharpness, non_uniformity=non_uniformity
        )
        self._region = _region(record)
        if self._count % self._stride == 0:
            self._points.append(self._newest)
        self._count += 1
        if len(self._points) > _POINTS_SHOWN:
            self._points, self._stride = self._points[::2], 2 * self._stride

    def _mark(self, step: int, record: Mapping[str, float]) -> None:
        for name, new in record.items():
            old = record.get(name.removesuffix("_to") + "_from")
            if not name.endswith("_to") or old is None or old == new:
                continue
            label = f"{name.removesuffix('_to').replace('_', ' ')} {'up' if new > old else 'down'}"
            # A staircase is marked where it begins: its steps would hide the trajectory.
            if not self._marks or self._marks[-1][1] != label:
                self._marks.append((step, label))

    @property
    def due(self) -> bool:
        """Whether the diagram should be drawn now."""
        return self._left > 1 and self._count > self._drawn and self._count in self._schedule

    def finish(self, writer: Any) -> None:
        """Draw the last one, if it is left and would show something new."""
        if self._left and self._count > self._drawn:
            self._left = 1
            self.draw(writer)

    def draw(self, writer: Any) -> None:
        self._left -= 1
        self._drawn = self._count
        points = self._points if self._points[-1] is self._newest else [*self._points, self._newest]
        figure = plot.diagram(self._region, points, marks=self._marks)
        step = self._newest.step
        writer.add_image("stability/diagram", plot.to_rgb(figure), step, dataformats="HWC")


def _region(record: Mapping[str, float]) -> plot.Region | None:
    """Return the region that ``record`` speaks of: exact for plain SGD, else the box, or none.

    >>> _region({"sharpness_limit": 38.0, "non_uniformity_limit": 9.0, "lr": 0.1, "batch_size": 4})
    (38.0, 9.0)
    """
    a = record.get("preconditioned_sharpness_limit", record.get("sharpness_limit", math.inf))
    s = record.get("non_uniformity_limit", math.inf)
    if not (a > 0 and s > 0):
        return None
    lr, batch_size, size = (record.get(name) for name in ("lr", "batch_size", "dataset_size"))
    if lr is not None and batch_size is not None and (size is None or batch_size <= size):
        rule = UpdateRule(lr=lr)
        region = StabilityRegion(rule, int(batch_size), None if size is None else int(size))
        # A record does not name the rule; its limits do, if they are those of plain SGD.
        if math.isclose(region.max_sharpness, a) and math.isclose(region.max_non_uniformity, s):
            return region
    return (a, s)
