"""Charts of a run as inline SVG with the colours and fonts of the page."""

from __future__ import annotations

import importlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stableopt.plot.canvas import spans_decades
from stableopt.report.run import FlightReport, Run, number
from stableopt.report.summary import scientific, titled, with_ratio
from stableopt.stability.measure.registry import QUANTITIES

__all__ = ["Chart", "HeatMap", "charts", "charts_of_report", "heat_map", "thinned"]

_MOST_POINTS = 600
"""Points of a line, about the number of a chart's pixels."""

_MOST_CHARTS = 14
_COLUMNS, _ROWS = 120, 24
"""Steps and layers of the heat map."""

_LARGEST = 1e30
"""Largest number drawn: larger ones, as at the end of a diverging run, would flatten all others."""

Points = Sequence[tuple[float, float]]

# Placeholders in matplotlib's SVG for the page's colours, which differ between light and dark.
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
        steps: the first and the last step.
        rows: for each layer its name, its share at the last step, and its cells ``(column, share)``.
        columns: the number of columns.
        most: the largest share.
        others: the number of layers that are left out.
    """

    steps: tuple[int, int]
    rows: Sequence[tuple[str, float, Sequence[tuple[int, float]]]]
    columns: int
    most: float
    others: int


def charts(run: Run) -> list[Chart]:
    """Return the charts of a run, except those without numbers.

    Raises:
        ImportError: without matplotlib.
    """
    return list(_charts(run))[:_MOST_CHARTS]


def _charts(run: Run) -> Iterator[Chart]:
    failed = [step for step, flag in run.numbers("failed") if flag == 1]
    alarms = [report.step for report in run.reports]
    # Reports overlap: the set holds each step once.
    batches = sorted({_step_and_loss(step) for report in run.reports for step in report.steps})
    lines = [("batch", batches, _MUTED), ("probe set", run.numbers("loss"), _BLUE)]
    yield from _chart("loss", lines, failed=failed, alarms=alarms)
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
    measured = {name for record in run.records for name in record}
    for name in QUANTITIES:
        if name in measured and name not in limited:
            yield from _chart(titled(name), [("", run.numbers(name), _BLUE)], alarms=alarms)


def charts_of_report(report: FlightReport) -> list[Chart]:
    """Return the charts of the steps before an alarm."""
    alarms = [report.step]
    losses = [_step_and_loss(step) for step in report.steps]
    probe = [(each.step, each.loss) for each in report.measured]
    ratios = [(each.step, each.ratio) for each in report.measured]
    norms = [(step["step"], _norm(step)) for step in report.steps]
    rates = [(step["step"], number(step.get("lr"))) for step in report.steps]
    lines = [("batch", losses, _MUTED), ("probe set", probe, _BLUE)]
    return [
        *_chart("loss", lines, alarms=alarms),
        *_chart("norm of the gradient", [("", norms, _BLUE)], alarms=alarms),
        *_chart("sharpness / limit", [("", ratios, _BLUE)], limit=1.0, alarms=alarms),
        *_chart("learning rate", [("", rates, _BLUE)], alarms=alarms, steps=True),
    ]


def _step_and_loss(step: Mapping[str, Any]) -> tuple[int, float]:
    return step["step"], number(step.get("loss"))


def _norm(step: Mapping[str, Any]) -> float:
    """Return the norm of the gradient, if known the one before clipping; NaN without any."""
    if step.get("total_norm") is not None:
        return number(step["total_norm"])
    norms = step.get("grad_norms")
    numbers = [number(norm) for norm in norms.values()] if isinstance(norms, Mapping) else []
    return math.hypot(*numbers) if numbers else math.nan


def thinned(points: Points, most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most ``most`` of ``points``: the lowest and the highest of each bin, or a gap.

    >>> thinned([(step, float(step == 70)) for step in range(100)], most=4)
    [(0, 0.0), (1, 0.0), (50, 0.0), (70, 1.0)]
    """
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float]] = []
    bins = most // 2
    for index in range(bins):
        part = points[index * len(points) // bins : (index + 1) * len(points) // bins]
        finite = [place for place, (_, y) in enumerate(part) if math.isfinite(y)]
        if not finite:
            kept.append((part[0][0], math.nan))
            continue
        low = min(finite, key=lambda place: part[place][1])
        high = max(finite, key=lambda place: part[place][1])
        if low == high and len(finite) > 1:  # a constant bin keeps its first two points
            high = finite[1]
        kept += [part[place] for place in sorted({low, high})]
    return kept


def heat_map(run: Run) -> HeatMap | None:
    """Return the shares of the layers, sorted by each layer's largest share; ``None`` without shares."""
    measured = list(run.shares.items())
    if not measured:
        return None
    count = min(len(measured), _COLUMNS)
    # Evenly spaced, with the last measurement.
    chosen = [measured[(k + 1) * len(measured) // count - 1] for k in range(count)]
    steps, columns = [step for step, _ in chosen], [shares for _, shares in chosen]
    most: dict[str, float] = {}
    for shares in columns:
        for name, share in shares.items():
            most[name] = max(most.get(name, 0.0), share if math.isfinite(share) else 0.0)
    names, largest = sorted(most, key=lambda name: -most[name]), max(most.values())
    rows = []
    for name in names[:_ROWS]:
        cells = [(k, shares.get(name, 0.0)) for k, shares in enumerate(columns)]
        visible = [(k, share) for k, share in cells if share > largest / 50]
        rows.append((name, columns[-1].get(name, 0.0), visible))
    others = len(names) - len(rows)
    return HeatMap((steps[0], steps[-1]), rows, count, largest, others)


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
    """Yield a chart of ``lines``, each ``(label, points, colour)``, if any has a number."""
    drawn = [(label, thinned(points), colour) for label, points, colour in lines]
    drawn = [line for line in drawn if any(_is_drawable(y) for _, y in line[1])]
    if not drawn:
        return
    matplotlib = importlib.import_module("matplotlib")
    # The user's settings, such as LaTeX, do not apply to this figure.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": f"stableopt {title}"})
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(4.6, 2.3))
        # Fixed margins, since tick labels have at most seven characters: a layout engine is slow.
        axes = figure.add_axes((0.125, 0.2, 0.86, 0.77))
        _draw(axes, drawn, limit, failed, alarms, steps)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    yield Chart(title, _inline(out.getvalue(), title))


_STYLE = {
    "ytick.minor.size": 0.0,
    "svg.fonttype": "none",  # text stays text: in the page's font, and selectable
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
        x = [step for step, _ in points]
        y = [value if _is_drawable(value) else math.nan for _, value in points]
        style = "o-" if len(points) < 40 else "-"
        kind = "steps-post" if steps else "default"
        axes.plot(x, y, style, color=colour, label=label, drawstyle=kind, lw=1.2, markersize=2.5)
    numbers = [y for _, points, _ in lines for _, y in points if _is_drawable(y)]
    if limit is not None:
        axes.axhline(limit, color=_RED, linestyle="--", lw=1.2)
        numbers.append(limit)
    low, high = min(numbers), max(numbers)
    if spans_decades(low, high):
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
    tick_label = _tick_label(*axes.get_ylim(), is_log=axes.get_yscale() == "log")
    axes.yaxis.set_major_formatter(_ticker("FuncFormatter")(lambda y, _: tick_label(y)))
    axes.set_xlabel("step")
    if any(label for label, _, _ in lines):  # other charts have the same marks without a legend
        ends_with_alarm = list(alarms) == [round(axes.dataLim.x1)]
        axes.legend(loc="upper left" if ends_with_alarm else "upper right")


def _tick_label(low: float, high: float, *, is_log: bool) -> Callable[[float], str]:
    """Return the one format of all tick labels of an axis from ``low`` to ``high``.

    Its labels have at most seven characters.

    >>> [_tick_label(0.5, 2e4, is_log=True)(10.0**k) for k in (0, 2, 4)]
    ['1e0', '1e2', '1e4']
    >>> [_tick_label(0.0, 1.2e4, is_log=False)(k) for k in (0, 8000.0, 12000.0)]
    ['0', '8,000', '12,000']
    """
    largest = max(abs(low), abs(high))
    is_plain = low >= 1e-3 and high < 1e4 if is_log else 1e-2 <= largest < 1e6
    return (lambda y: f"{y:,.6g}") if is_plain else scientific


def _is_drawable(y: float) -> bool:
    return abs(y) < _LARGEST


def _ticker(name: str) -> Any:
    return getattr(importlib.import_module("matplotlib.ticker"), name)


def _inline(svg: str, title: str) -> str:
    """Return the element ``svg`` with the colours, font and width of the page."""
    svg = svg[svg.index("<svg") :]
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # unused, and the same in each chart
    # A style element would apply to the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    opening = re.sub(r' (width|height|xmlns(:\w+)?|version)="[^"]*"', "", svg[: svg.index(">")])
    return f'{opening} role="img">{svg[svg.index(">") + 1 :]}'
