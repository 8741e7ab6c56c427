"""`TensorBoardSink`: writes live charts of the margins, and the stability diagram, to TensorBoard."""

from __future__ import annotations

import atexit
import math
import os
import shlex
import warnings
from collections.abc import Collection, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from stableopt import plot
from stableopt._support.arguments import shown
from stableopt.curvature import SpectralDensity
from stableopt.plot.canvas import require_matplotlib
from stableopt.sinks.diagrams import Diagrams, LayerMaps
from stableopt.sinks.events import Event, Measured
from stableopt.sinks.layer_scalars import LayerScalars
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.registry import QUANTITIES, Chart, split

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardSink", "layout"]

_LONGEST_TAG = 25  # characters that fit the legends of the Custom Scalars dashboard
_POINTS_SHOWN = 1000  # points of a tag that TensorBoard keeps by default
_DIAGRAM_NAMES = ("sharpness", "preconditioned_sharpness", "non_uniformity")
_BINS = 60  # bins of a spectrum
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # range of float32, the precision of event files


def _charts() -> dict[str, Chart]:
    return {name: quantity.chart for name, quantity in QUANTITIES.items() if quantity.chart}


def _tags(chart: Chart) -> dict[str, list[str]]:
    """Return the tags of value, lower and upper end for each Margin chart, by its title."""
    tag, short = f"stability/{chart.tag}", f"stability/{chart.short_tag}"
    return {
        f"{chart.title} / limit": [f"{tag}_ratio", f"{short}_ratio_low", f"{short}_ratio_up"],
        f"{chart.title} and its limit": [f"{tag}_value", f"{tag}_lower", f"{tag}_upper"],
    }


def layout(measured: Collection[str] | None = None) -> dict[str, dict[str, list[Any]]]:
    """Return the Custom Scalars dashboard, as ``SummaryWriter.add_custom_scalars`` takes it.

    Every run has charts of sharpness and non-uniformity; other quantities have them only if they are
    ``measured``, by default all. Runs must agree on each chart: TensorBoard merges the layouts of all
    runs, and shows a chart once for each different definition.
    """
    shown = {
        name: chart
        for name, chart in _charts().items()
        if measured is None or QUANTITIES[name].in_box or name in measured
    }
    charts = [item for chart in shown.values() for item in _tags(chart).items()]
    # TensorBoard shows the charts of a category from the last to the first.
    return {"edge of stability": {title: ["Margin", tags] for title, tags in reversed(charts)}}


class TensorBoardSink:
    r"""Writes measurements to TensorBoard.

    - *Custom Scalars*: sharpness, preconditioned sharpness and non-uniformity relative to their
      limits, with a band from 0.99 to 1.01, and in their own units, with a band of ±1 % around the
      limit; other quantities according to their
      :class:`~stableopt.stability.measure.registry.Chart`. A value without a limit, such as the
      non-uniformity of full-batch gradient descent or the plain sharpness of a preconditioned
      optimizer, is only among the scalars.
    - *Scalars*: every finite number of a record, as ``stability/<name>`` of at most 25 characters
      (``non_uniformity_ratio`` is ``stability/non_unif_ratio``), and the bands.
    - *Scalars* of layers: the share of each layer in the top eigenvector,
      ``stability_layers_share/<name>``, and with the quantity ``"layers"`` its ratio to the limit and
      its mean curvature. More than 16 layers are merged by kind, such as ``blocks.*.mlp``: the sum of
      the shares, the largest ratio.
    - *Images*: the sharpness / non-uniformity diagram, if both are measured, with the region of the
      optimizer's update rule, and the decisions of steering as marks; and heat maps of all layers,
      :func:`stableopt.plot.layers`. They are drawn at log-spaced measurements, and a last time at the
      first :meth:`flush` or :meth:`close` with a new measurement, or else when the program ends.
    - *Histograms*: each measured spectrum, as ``spectra/<name>``.
    - *Text*: each decision and its reason, as ``stability/decisions``.

    The sink flushes its own writer after every record, and never flushes a given one between records.
    TensorBoard keeps one layout per run, and merges those of several runs. Inside the run of a given
    writer the layout therefore goes into a sub-run, ``stability``, so that the writer's own stays.

    Args:
        writer_or_dir: the run's directory, or a ``torch.utils.tensorboard.SummaryWriter``.
        max_diagrams: the largest number of diagrams, and of heat maps; TensorBoard keeps ten images
            per tag. 0 draws none and needs no matplotlib.
        announce: print :attr:`command` and :attr:`link` with the first record.

    Raises:
        ImportError: without tensorboard, or without matplotlib unless ``max_diagrams`` is 0.
        TypeError: if ``writer_or_dir`` is neither a directory nor a writer.
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
    """The page of the charts, without smoothing, which would draw values away from their limits."""

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
            require_matplotlib()
        self._owns_writer = isinstance(writer_or_dir, (str, os.PathLike))
        if not self._owns_writer and not hasattr(writer_or_dir, "add_custom_scalars"):
            raise TypeError(
                f"writer_or_dir={shown(writer_or_dir)}: expected a directory or a SummaryWriter"
            )
        self.writer: Any = _new_writer(writer_or_dir) if self._owns_writer else writer_or_dir
        self._announce = announce
        self._records, self._registered = 0, False
        self._names_by_tag: dict[str, str] = {}
        self._diagrams, self._maps = Diagrams(max_diagrams), LayerMaps(max_diagrams)
        self._layer_scalars = LayerScalars()

    @property
    def command(self) -> str:
        """The shell command that starts TensorBoard on this run."""
        return f"tensorboard --logdir {shlex.quote(str(self.writer.log_dir))}"

    def receive(self, event: Event) -> None:
        """Write a measurement, or a decision and its reason."""
        record = event.record()
        if isinstance(event, Measured):
            self._write(event.step, record, event.margins, event.region)
        else:
            if event.decision.changes:
                self._diagrams.mark(event.step, event.decision.label)
            self._write(event.step, record)
            self.note(event.step, str(event.decision))

    def __call__(self, step: int, record: Mapping[str, float]) -> None:
        """Write a record without its update rule: the diagram shows the limits as a box.

        Raises:
            ValueError: if two names of the record have the same tag.
        """
        values = {name: record[name] for name in _DIAGRAM_NAMES if name in record}
        margins = StabilityMargins.from_dict({"step": int(step), **values, "measurements": {}})
        plain_limit = record.get("sharpness_limit", math.inf)
        sharpness_limit = record.get("preconditioned_sharpness_limit", plain_limit)
        box = (sharpness_limit, record.get("non_uniformity_limit", math.inf))
        region = box if all(limit > 0 for limit in box) else None
        self._write(margins.step, record, margins, region)

    def note(self, step: int, text: str) -> None:
        """Write ``text``, a decision at ``step`` and its reason."""
        self.writer.add_text("stability/decisions", text, int(step))

    def flush(self) -> None:
        """Write everything to disk; the first time with a diagram of the newest point."""
        atexit.unregister(self._flush_at_exit)
        self._registered = False
        for images in (self._diagrams, self._maps):
            images.finish(self.writer)
        self.writer.flush()

    def _flush_at_exit(self) -> None:
        """Flush when the program ends, unless the writer is closed."""
        if getattr(self.writer, "all_writers", ()) is not None:
            self.flush()

    def close(self) -> None:
        """Flush, and close the writer if the sink created it."""
        self.flush()
        if self._owns_writer:
            self.writer.close()

    def __repr__(self) -> str:
        return f"TensorBoardSink({str(self.writer.log_dir)!r})"

    def _write(
        self,
        step: int,
        record: Mapping[str, float],
        margins: StabilityMargins | None = None,
        region: plot.Region | None = None,
    ) -> None:
        if self._records == 0:
            self._add_layout({split(key)[0] for key in record})
            if self._announce:
                print(f"{self.command}\n{self.link}")
        if not self._registered:
            atexit.register(self._flush_at_exit)
            self._registered = True
        self._records += 1
        scalars = self._scalars(record)
        if margins is not None and margins.layers is not None:
            scalars |= self._layer_scalars.of(margins.layers)
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)
        if margins is not None:
            self._diagrams.add(margins, region)
            self._maps.add(margins)
            self._add_histograms(step, margins)
        for images in (self._diagrams, self._maps):
            if images.due:
                images.draw(self.writer)
        if self._owns_writer:
            self.writer.flush()
        if self._records == _POINTS_SHOWN + 1:
            warnings.warn(
                f"the run has more than {_POINTS_SHOWN:,} measurements, and TensorBoard shows a random"
                f" {_POINTS_SHOWN:,} of them; to see all: {self.command} --samples_per_plugin"
                " scalars=0",
                UserWarning,
                stacklevel=2,
            )

    def _add_histograms(self, step: int, margins: StabilityMargins) -> None:
        """Write each measured spectrum as counts of eigenvalues in bins."""
        for name, result in margins.results.items():
            if result.density is not None and math.isfinite(result.density.nodes[-1]):
                self.writer.add_histogram_raw(
                    f"spectra/{name}", **_bins(result.density), global_step=step
                )

    def _add_layout(self, measured: Collection[str]) -> None:
        folder = None if self._owns_writer else getattr(self.writer, "log_dir", None)
        writer = self.writer if folder is None else _new_writer(os.path.join(folder, "stability"))
        writer.add_custom_scalars(layout(measured))
        if folder is not None:
            writer.close()

    def _scalars(self, record: Mapping[str, float]) -> dict[str, float]:
        """Return the finite numbers of ``record`` by tag."""
        scalars: dict[str, float] = {}
        charts = _charts()
        for key, value in record.items():
            name, part = split(key)
            # `_bands` writes a ratio with a chart together with its band, or not at all.
            if abs(value) <= _LARGEST and not (part == "ratio" and name in charts):
                scalars[self._tag(key)] = value
        for name, chart in charts.items():
            limit = record.get(f"{name}_limit", math.inf)
            scalars.update(_bands(chart, record.get(name, math.nan), limit))
        return scalars

    def _tag(self, name: str) -> str:
        tag = _short(name)
        other = self._names_by_tag.setdefault(tag, name)
        if other != name:
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


def _bins(density: SpectralDensity) -> dict[str, Any]:
    """Return a spectrum as ``SummaryWriter.add_histogram_raw`` takes it: counts in equal bins.

    >>> _bins(SpectralDensity((0.0, 4.0), (0.75, 0.25), 0.5, size=8, products=2))["num"]
    8
    """
    nodes, shares = np.array(density.nodes), density.size * np.array(density.weights)
    counts, edges = np.histogram(nodes, bins=_BINS, weights=shares)
    return {
        "min": float(nodes[0]),
        "max": float(nodes[-1]),
        "num": density.size,
        "sum": float(nodes @ shares),
        "sum_squares": float(nodes**2 @ shares),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def _short(name: str) -> str:
    """Return the tag of ``name``; if it is too long, its words are cut to a common length.

    >>> _short("sharpness"), _short("non_uniformity_limit"), _short("preconditioned_sharpness")
    ('stability/sharpness', 'stability/non_unif_limit', 'stability/pre_sharpness')
    """
    room = _LONGEST_TAG - len("stability/")
    if len(name) > room:
        name = name.replace("_gradient_share", "_grad").replace("_step_share", "_step")
        name = name.replace("non_uniformity", "non_unif")
        name = name.replace("preconditioned_sharpness", "pre_sharpness")
    length = len(name)
    words = name.split("_")
    while len(name) > room and length > 1:
        length -= 1
        name = "_".join(word[:length] for word in words)
    return f"stability/{name[:room]}"


def _bands(chart: Chart, value: float, limit: float) -> dict[str, float]:
    """Return the scalars of both Margin charts, or none if a number cannot be shown.

    TensorBoard shows an error unless the three tags of a Margin chart have the same steps, so they are
    written together or not at all. The plain tag, such as stability/non_uniformity, has every
    measurement, also those without a limit.
    """
    if not (math.isfinite(value) and 0 < limit < math.inf):
        return {}
    low, high = 1 - chart.band, 1 + chart.band
    numbers = [value / limit, low, high, value, low * limit, high * limit]
    if max(map(abs, numbers)) > _LARGEST or low * limit < _SMALLEST:
        return {}
    return dict(zip(chain.from_iterable(_tags(chart).values()), numbers, strict=True))
