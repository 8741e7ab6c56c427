"""Charts of a run as SVG that takes its colours and fonts from the page."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopt.report.run import FlightReport, Run, number
from stableopt.report.summary import shown, titled, with_ratio
from stableopt.stability.measure.quantities import QUANTITIES

__all__ = ["Chart", "HeatMap", "charts", "charts_of_report", "heat_map", "thinned"]

_MOST_POINTS = 600
"""Points of a line, about as many as a chart has pixels."""

_MOST_CHARTS = 14
_COLUMNS, _ROWS = 120, 24
"""Cells of the heat map: steps, and layers."""

_LARGEST = 1e30
"""Larger numbers, as a run that diverges ends in, would make all others look like zero."""

_LOG_FROM = 20.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""

Points = Sequence[tuple[float, float]]

# Colours that the page replaces by its own, which differ between light and dark.
_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--so-muted)",
    "#030303": "var(--so-blue)",
    "#040404": "var(--so-red)",
    "#050505": "var(--so-mark)",
}
_INK, _MUTED, _BLUE, _RED, _MARK = _COLOURS


@dataclass(frozen=True)
class Chart:
    """A chart: its title, and its SVG."""

    title: str
    svg: str


@dataclass(frozen=True)
class HeatMap:
    """The shares of layers over steps.

    Attributes:
        steps: the first and the last.
        rows: a layer, its share at the last of the steps, and ``(column, share)`` of its cells.
        columns: how many there are.
        most: the largest share.
        others: how many layers are left out.
    """

    steps: tuple[int, int]
    rows: Sequence[tuple[str, float, Sequence[tuple[int, float]]]]
    columns: int
    most: float
    others: int


def charts(run: Run) -> list[Chart]:
    """Return the charts of a run, without those that have no number.

    Raises:
        ImportError: without matplotlib.
    """
    return list(_charts(run))[:_MOST_CHARTS]


def _charts(run: Run) -> Iterator[Chart]:
    failed = [step for step, its in run.numbers("failed") if its == 1]
    alarms = [report.step for report in run.reports]
    batches = sorted({_pair(its) for report in run.reports for its in report.steps})
    yield from _chart(
        "loss",
        [("batch", batches, _MUTED), ("probe set", run.numbers("loss"), _BLUE)],
        failed=failed,
        alarms=alarms,
    )
    rates = run.numbers("lr")
    yield from _chart("learning rate", [("", rates, _BLUE)], alarms=alarms, steps=True)
    sizes = run.numbers("batch_size")
    if len({size for _, size in sizes if not math.isnan(size)}) > 1:
        yield from _chart("batch size", [("", sizes, _BLUE)], alarms=alarms, steps=True)
    limited = dict.fromkeys(name for record in run.records for name in with_ratio(record))
    for name in limited:
        points = run.numbers(f"{name}_ratio")
        yield from _chart(
            f"{titled(name)} / limit", [("", points, _BLUE)], limit=1.0, alarms=alarms
        )
    # Few of the records name all that was measured: the set is small, and each is looked up once.
    measured = {name for record in run.records for name in record if name in QUANTITIES}
    for name in QUANTITIES:
        if name in measured and name not in limited:
            yield from _chart(titled(name), [("", run.numbers(name), _BLUE)], alarms=alarms)


def charts_of_report(report: FlightReport) -> list[Chart]:
    """Return the charts of the steps before an alarm."""
    alarms = [report.step]
    losses = [_pair(its) for its in report.steps]
    probe = [(step, loss) for step, loss, _, _ in report.measured]
    ratios = [(step, ratio) for step, _, ratio, _ in report.measured]
    norms = [(its["step"], _norm(its.get("grad_norms"))) for its in report.steps]
    rates = [(its["step"], number(its.get("lr"))) for its in report.steps]
    lines = [("batch", losses, _MUTED), ("probe set", probe, _BLUE)]
    return [
        *_chart("loss", lines, alarms=alarms),
        *_chart("norm of the gradient", [("", norms, _BLUE)], alarms=alarms),
        *_chart("sharpness / limit", [("", ratios, _BLUE)], limit=1.0, alarms=alarms),
        *_chart("learning rate", [("", rates, _BLUE)], alarms=alarms, steps=True),
    ]


def _pair(step: Mapping[str, Any]) -> tuple[int, float]:
    return step["step"], number(step.get("loss"))


def _norm(norms: Any) -> float:
    numbers = [number(its) for its in norms.values()] if isinstance(norms, Mapping) else []
    return math.hypot(*numbers) if numbers else math.nan


def thinned(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most ``most`` of ``points`` with their lowest and highest, and gaps.

    >>> thinned([(step, float(step == 70)) for step in range(100)], most=4)
    [(0, 0.0), (1, 0.0), (50, 0.0), (70, 1.0)]
    """
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float]] = []
    bins = most // 2
    for index in range(bins):
        part = points[index * len(points) // bins : (index + 1) * len(points) // bins]
        known = [place for place, (_, y) in enumerate(part) if math.isfinite(y)]
        if not known:
            kept.append((part[0][0], math.nan))
            continue
        low = min(known, key=lambda place: part[place][1])
        high = max(known, key=lambda place: part[place][1])
        if low == high:
            high = known[1] if len(known) > 1 else low
        kept += [part[place] for place in sorted({low, high})]
    return kept


def heat_map(run: Run) -> HeatMap | None:
    """Return the shares of the layers, those that held most of an eigenvector first; or ``None``."""
    found = list(run.shares.items())
    if not found:
        return None
    columns = min(len(found), _COLUMNS)
    chosen = [found[(k + 1) * len(found) // columns - 1] for k in range(columns)]
    most: dict[str, float] = {}
    for _, shares in chosen:
        for name, share in shares.items():
            most[name] = max(most.get(name, 0.0), share if math.isfinite(share) else 0.0)
    names, largest = sorted(most, key=lambda name: -most[name]), max(most.values())
    rows = [
        (
            name,
            chosen[-1][1].get(name, 0.0),
            # A fiftieth of the largest cannot be seen.
            [(k, s[name]) for k, (_, s) in enumerate(chosen) if s.get(name, 0.0) > largest / 50],
        )
        for name in names[:_ROWS]
    ]
    return HeatMap((chosen[0][0], chosen[-1][0]), rows, columns, largest, len(names) - len(rows))


# -- matplotlib ------------------------------------------------------------------------------------


def _chart(
    title: str,
    lines: Iterable[tuple[str, Points, str]],
    *,
    limit: float | None = None,
    failed: Sequence[float] = (),
    alarms: Sequence[float] = (),
    steps: bool = False,
) -> Iterator[Chart]:
    """Yield a chart, if a line has a number: of lines ``(label, points, colour)``."""
    drawn = [(label, thinned(points), colour) for label, points, colour in lines]
    drawn = [line for line in drawn if any(_drawable(y) for _, y in line[1])]
    if not drawn:
        return
    matplotlib = importlib.import_module("matplotlib")
    # What the user set, LaTeX included, is for the user's own figures.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": f"stableopt {title}"})
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(4.6, 2.3))
        # A layout engine would take as long as all the rest; numbers have at most seven characters.
        axes = figure.add_axes((0.125, 0.2, 0.86, 0.77))
        _draw(axes, drawn, limit, failed, alarms, steps)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    yield Chart(title, _inline(out.getvalue(), title))


_STYLE = {
    "ytick.minor.size": 0.0,
    "svg.fonttype": "none",  # text that the page's font draws, and that can be selected
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _draw(
    axes: Any,
    lines: Sequence[tuple[str, Points, str]],
    limit: float | None,
    failed: Sequence[float],
    alarms: Sequence[float],
    steps: bool,
) -> None:
    for label, points, colour in lines:
        x, y = zip(*((x, y if _drawable(y) else math.nan) for x, y in points), strict=True)
        style = "o-" if len(points) < 40 else "-"
        kind = "steps-post" if steps else "default"
        axes.plot(x, y, style, color=colour, label=label, drawstyle=kind, lw=1.2, markersize=2.5)
    numbers = [y for _, points, _ in lines for _, y in points if _drawable(y)]
    if limit is not None:
        axes.axhline(limit, color=_RED, linestyle="--", lw=1.2)
        numbers.append(limit)
    low, high = min(numbers), max(numbers)
    if low > 0 and high > _LOG_FROM * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    elif low >= 0:
        axes.set_ylim(0.0, 1.1 * high or 1.0)
    for index, step in enumerate(alarms):
        axes.axvline(step, color=_MARK, lw=1.0, label=None if index else "alarm")
    if failed:
        crosses = [step for step, _ in thinned([(step, 0.0) for step in failed], 200)]
        bottom = {"color": _MARK, "transform": axes.get_xaxis_transform()}
        axes.plot(crosses, [0.03] * len(crosses), "x", markersize=4, label="failed", **bottom)
    axes.xaxis.set_major_locator(_ticker("MaxNLocator")(5, integer=True))
    axes.xaxis.set_major_formatter(_ticker("FuncFormatter")(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(_ticker("FuncFormatter")(lambda y, _: shown(y)))
    axes.set_xlabel("step")
    if any(label for label, _, _ in lines):  # one chart explains the marks for all
        # A report ends with its alarm.
        axes.legend(loc="upper left" if list(alarms) == [round(axes.dataLim.x1)] else "upper right")


def _drawable(y: float) -> bool:
    return abs(y) < _LARGEST


def _ticker(name: str) -> Any:
    return getattr(importlib.import_module("matplotlib.ticker"), name)


def _inline(svg: str, title: str) -> str:
    """Return the element ``svg`` in the colours, font and width of the page."""
    svg = svg[svg.index("<svg") :]
    for colour, own in _COLOURS.items():
        svg = svg.replace(colour, own)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # which nothing refers to, and each chart has
    # Its rules would hold for the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    opening = re.sub(r' (width|height|xmlns(:\w+)?|version)="[^"]*"', "", svg[: svg.index(">")])
    return f'{opening} role="img">{svg[svg.index(">") + 1 :]}'
