"""`write_report`: a report as JSON, Markdown and a figure, in a folder that appears once complete."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.plot.canvas import BLUE, GREEN, PURPLE, VERMILION, spans_decades
from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, MeasuredRecord, StepRecord
from stableopt.recorder.finding import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "reason_of", "report_folder", "why", "write_report"]

_LONGEST = 300
"""Characters of an error message: those of LaTeX fill pages."""

_ROWS = 10
"""Rows of each table in the Markdown."""

_MEASUREMENTS_HEADER = """\
| step | loss | sharpness / limit | non-uniformity / limit | most of the eigenvector |
| ---: | ---: | ---: | ---: | --- |"""

_STEPS_HEADER = """\
| step | learning rate | loss | gradient norm | largest in | batch |
| ---: | ---: | ---: | ---: | --- | --- |"""


def write_report(
    folder: Path,
    alarm: Alarm,
    verdict: Verdict,
    evidence: Evidence,
    weights: Mapping[str, Tensor] | None = None,
    missing: dict[str, str] | None = None,
) -> Path:
    """Write a report into a new folder ``step-<step>`` of ``folder``; return its path.

    A part that cannot be written is left out, and the other parts name it.

    Args:
        folder: the parent folder, created if it does not exist.
        alarm: the event.
        verdict: its likely cause.
        evidence: the steps and measurements before it.
        weights: the content of ``last_good.pt``; ``None`` for a report without this file.
        missing: parts that the report lacks already, with the reason; parts that fail are added.

    Raises:
        Exception: if neither ``report.json`` nor ``report.md`` can be written.
    """
    missing = {} if missing is None else missing
    errors: dict[str, Exception] = {}
    folder.mkdir(parents=True, exist_ok=True)
    # A killed process leaves this folder behind; its name says that it is incomplete.
    partial = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))

    def write_part(name: str, write: Callable[[Path], object]) -> bool:
        """Write a file as a whole; return whether that worked."""
        try:
            write(partial / "part")
            os.replace(partial / "part", partial / name)
        except Exception as error:
            missing[name], errors[name] = why(error), error
            with suppress(OSError):
                (partial / "part").unlink()
        return name not in missing

    def write_texts(figure: bool) -> None:
        def write_json(path: Path) -> None:
            path.write_text(_json(alarm, verdict, evidence, missing) + "\n", encoding="utf-8")

        def write_markdown(path: Path) -> None:
            text = markdown(alarm, verdict, evidence, figure=figure, missing=missing)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

        has_json = write_part("report.json", write_json)
        has_markdown = write_part("report.md", write_markdown)
        if not (has_json or has_markdown):
            raise errors["report.json"]

    try:
        write_texts(figure=False)  # before the figure, which may fail on a full disk
        has_figure = False
        if importlib.util.find_spec("matplotlib") is not None:
            has_figure = write_part("report.png", lambda path: _save(alarm, evidence, path))
        if weights is not None:
            write_part("last_good.pt", lambda path: torch.save(dict(weights), path))
        if has_figure or missing:
            write_texts(figure=has_figure)
        partial.chmod(0o755)
        path = _unused(folder / f"step-{alarm.step}")
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def why(error: Exception) -> str:
    r"""Return an error in one line, without the names of temporary files, which would defeat WarnOnce.

    >>> why(OSError(28, "No space left on device", "/tmp/x")), why(ValueError("so\n  long"))
    ('OSError: No space left on device', 'ValueError: so long')
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(f"{type(error).__name__}: {text}", _LONGEST)


def report_folder(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` if it is a folder, or can become one."""
    folder = Path(path)
    place = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), folder)
    if os.path.lexists(place) and not os.path.isdir(place):
        raise ValueError(f"folder={str(path)!r}: expected a folder, and {place} is not one")
    return folder.absolute()  # the program may change its working directory


def reason_of(error: Exception) -> str:
    """Return the operating system's reason of an error, or for another error :func:`why`.

    >>> reason_of(FileExistsError(17, "File exists")), reason_of(ValueError("so"))
    ('File exists', 'ValueError: so')
    """
    return (isinstance(error, OSError) and error.strerror) or why(error)


def _json(alarm: Alarm, verdict: Verdict, evidence: Evidence, missing: Mapping[str, str]) -> str:
    content = {
        "alarm": vars(alarm),
        "verdict": {**vars(verdict), "advice": verdict.advice},
        "evidence": evidence.to_dict(),
        "missing": missing,
    }
    return json.dumps(_strict(content), indent=1, allow_nan=False)


def _unused(path: Path) -> Path:
    """Return ``path``, or with a number appended if it exists, as from an earlier run."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused


def _strict(value: Any) -> Any:
    """Return ``value`` as strict JSON: infinity and NaN as ``None``, unknown objects as strings."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def markdown(
    alarm: Alarm,
    verdict: Verdict,
    evidence: Evidence,
    *,
    figure: bool = True,
    missing: Mapping[str, str] | None = None,
) -> str:
    """Return the report as Markdown.

    >>> text = markdown(Alarm("loss", 9, "the loss rose"), Verdict("unknown", "The loss rose."),
    ...                 Evidence([], []))
    >>> text.splitlines()[0]
    '# Step 9: the loss rose'
    """
    return "\n".join(_lines(alarm, verdict, evidence, figure, missing or {})) + "\n"


def _lines(
    alarm: Alarm, verdict: Verdict, evidence: Evidence, figure: bool, missing: Mapping[str, str]
) -> Iterator[str]:
    yield f"# Step {alarm.step:,}: {alarm.text}"
    yield ""
    yield verdict.text
    yield ""
    place = f", in `{verdict.layer}`" if verdict.layer else ""
    yield f"Likely cause: **{verdict.cause}**{place}."
    yield ""
    yield f"What to do: {verdict.advice}"
    yield ""
    for part, reason in missing.items():
        yield f"Missing: {part} ({reason})."
        yield ""
    if figure:
        yield "![Loss, margins, gradient and learning rate before the alarm](report.png)"
        yield ""
    if evidence.measured:
        yield "## Measurements"
        yield ""
        yield _MEASUREMENTS_HEADER
        for record in evidence.measured[-_ROWS:]:
            yield _measured_row(record)
        yield ""
    if evidence.steps:
        yield "## Steps"
        yield ""
        yield _STEPS_HEADER
        for step in evidence.steps[-_ROWS:]:
            yield _step_row(step)
        yield ""


def _measured_row(record: MeasuredRecord) -> str:
    margins, shares = record.margins, list(record.shares.items())[:3]
    layers = ", ".join(f"`{name}` {share:.0%}" for name, share in shares)
    cells = (margins.loss, record.ratio, margins.non_uniformity_ratio)
    last = shorten(margins.failure, _LONGEST) if margins.failure else layers
    return f"| {record.step} | {' | '.join(map(_number, cells))} | {_cell(last)} |"


def _step_row(record: StepRecord) -> str:
    norms, samples = record.grad_norms, record.batch or ()
    largest = f"`{max(norms, key=lambda name: norms[name])}`" if norms else ""
    listed = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    cells = (record.lr, record.loss, _norm(record) if norms else None)
    numbers = " | ".join(map(_number, cells))
    return f"| {record.step} | {numbers} | {_cell(largest)} | {_cell(listed)} |"


def _cell(text: str) -> str:
    """Return text that cannot end a cell or a row."""
    return " ".join(text.split()).replace("|", "\\|")


def _norm(step: StepRecord) -> float:
    """Return the norm of the gradient, if known the one before clipping."""
    return step.grad_norm if step.total_norm is None else step.total_norm


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _save(alarm: Alarm, evidence: Evidence, path: Path) -> None:
    import matplotlib

    # The user's settings, such as LaTeX, do not apply to this figure.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        draw(alarm, evidence).savefig(path, format="png", dpi=120)


def draw(alarm: Alarm, evidence: Evidence) -> Figure:
    """Return the figure of a report: loss, margins, gradient norm and learning rate by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    steps, measured = evidence.steps, evidence.measured
    margins = [record.margins for record in measured]
    _line(panels[0], [(s.step, s.loss) for s in steps], "batch", "#999999")
    _line(panels[0], [(m.step, m.loss) for m in margins], "probe set", BLUE, "o-")
    _line(panels[1], [(m.step, m.edge_ratio) for m in margins], "sharpness", VERMILION, "o-")
    ratios = [(m.step, m.non_uniformity_ratio) for m in margins]
    _line(panels[1], ratios, "non-uniformity", GREEN, "o-")
    panels[1].axhline(1.0, color="black", linestyle="--", linewidth=1, label="limit")
    _line(panels[2], [(s.step, _norm(s)) for s in steps if s.grad_norms], "", BLUE)
    _line(panels[3], [(s.step, s.lr) for s in steps], "", BLUE)
    titles = ("loss", "value / limit", "norm of the gradient", "learning rate")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.axvline(alarm.step, color=PURPLE, linewidth=1)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize="small")
        values = [y for line in panel.get_lines()[:-1] for y in line.get_ydata()]
        positive = [y for y in values if 0 < y < math.inf]
        wide = bool(positive) and spans_decades(min(positive), max(positive))
        if wide and title != "learning rate":
            panel.set_yscale("log")
    for panel in panels[2:]:
        panel.set_xlabel("step")
    return figure


def _line(
    panel: Any, points: list[tuple[int, Any]], label: str, colour: str, style: str = "-"
) -> None:
    """Draw the points that have a value; one that is not finite leaves a gap."""
    drawn = [(x, y if math.isfinite(y) else math.nan) for x, y in points if y is not None]
    if drawn:
        x, y = zip(*drawn, strict=True)
        panel.plot(x, y, style, color=colour, label=label, markersize=3, linewidth=1)
