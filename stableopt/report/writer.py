"""`write_page`: a run as a self-contained HTML page; `notebook`: as an element of a notebook."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stableopt.report.charts import Chart, charts, charts_of_report, heat_map
from stableopt.report.reading import read_run
from stableopt.report.run import FlightReport, Run, number
from stableopt.report.summary import counts, rows, sentence, shown, with_ratio
from stableopt.stability.measure.measurement import level

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["notebook", "page", "write_page", "write_run"]

_DARK = (
    "--so-muted: #9a9a9a; --so-blue: #56b4e9; --so-red: #ff8b3d; --so-mark: #e39bd0;"
    " --so-green: #2fbf97;"
)
_MISSING = "needs jinja2 and matplotlib: pip install stableopt[report]"
_ALARMS, _MEASURED, _DECISIONS = 10, 6, 20
"""Alarms on a page, measurements before each alarm, and decisions."""

_NOTEBOOK_CHARTS = 4


def write_page(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a finished, running or crashed run; return its path.

    The page is one file without scripts and external resources. It is written completely or not at all.

    Args:
        path: the folder of the run, or its file of JSON lines: see :func:`read_run`.
        out: the file of the page, or a folder for ``report.html``; by default the folder of the run.

    Raises:
        ImportError: without jinja2 or matplotlib: ``pip install stableopt[report]``.
        FileNotFoundError, ValueError: as :func:`read_run` does.
        OSError: if the page cannot be written.

    >>> from stableopt import JSONLinesSink
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sink = JSONLinesSink(Path(folder) / "margins.jsonl")
    ...     sink(50, {"sharpness": 9.0, "sharpness_ratio": 0.45, "failed": 0.0, "converged": 1.0})
    ...     write_page(folder).name
    'report.html'
    """
    return write_run(read_run(path), path, out)


def write_run(
    run: Run, path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the page of ``run``, read from ``path``, as :func:`write_page` does; return its path."""
    text = page(run)
    path = Path(path)
    folder = path.parent if path.is_file() else path
    target = folder if out is None else Path(out)
    if target.is_dir():
        target = target / "report.html"
    if target.is_symlink():  # it stays, and what it leads to is written
        target = target.resolve()
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"out={target}: expected a file or a folder, and it is neither")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"out={target}: its folder does not exist")
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
    return target


def page(run: Run) -> str:
    """Return the page of ``run``.

    Raises:
        ImportError: without jinja2 or matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"a report {_MISSING}")
    alarms = [
        (report, list(_measured_rows(report)), charts_of_report(report))
        for report in run.reports[:_ALARMS]
    ]
    content = _content(run, charts(run))
    return _template().render(**content, compact=False, heat=heat_map(run), alarms=alarms)


def notebook(run: Run) -> str:
    """Return the HTML element for a notebook, with fewer charts; without matplotlib it has none.

    >>> "Nothing has been measured yet." in notebook(Run("demo"))
    True
    """
    has_charts = importlib.util.find_spec("matplotlib") is not None
    drawn = charts(run)[:_NOTEBOOK_CHARTS] if has_charts else []
    missing = "" if has_charts else f"A chart {_MISSING}."
    content = _content(run, drawn, missing)
    return _template().render(**content, compact=True, heat=heat_map(run), alarms=[])


def _content(run: Run, drawn: list[Chart], missing: str = "") -> Mapping[str, Any]:
    """Return the variables of the template that page and notebook share."""
    return {
        "run": run,
        "dark": _DARK,
        "sentence": sentence(run),
        "mood": _mood(run),
        "counts": list(counts(run)),
        "rows": list(rows(run)),
        "charts": drawn,
        "without_charts": missing,
        "decisions": list(run.decisions[: -_DECISIONS - 1 : -1]),
        "earlier": max(len(run.decisions) - _DECISIONS, 0),
    }


def _mood(run: Run) -> str:
    """Return the level that colours the sentence: ``"inside"``, ``"near"`` or ``"over"``."""
    if run.reports:
        return "over"
    for record in reversed(run.records):
        ratios = [number(record[f"{name}_ratio"]) for name in with_ratio(record)]
        ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
        if ratios:
            return level(max(ratios))
    all_failed = bool(run.records) and run.failed == len(run.records)
    return "over" if all_failed else "inside"


def _measured_rows(report: FlightReport) -> Iterator[tuple[int, str, str, str]]:
    """Yield step, loss, ratio and the three largest layers of the measurements before an alarm."""
    for step, loss, ratio, shares in report.measured[-_MEASURED:]:
        layers = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3])
        yield step, shown(loss), shown(ratio), layers


@cache
def _template() -> Template:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ImportError(f"a report {_MISSING}") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")
