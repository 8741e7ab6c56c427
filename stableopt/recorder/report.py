"""`write_report`: a report as JSON, Markdown and a figure, in a folder that appears as a whole."""

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

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord
from stableopt.recorder.finding import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "why", "write_report"]

_LONGEST = 300
"""Characters of a reason: LaTeX's errors have pages."""

_SHOWN = 10
"""Steps and measurements that the Markdown shows."""

_LOG_FROM = 20.0
"""Ratio of the largest to the smallest number from which an axis is logarithmic."""


def write_report(
    folder: Path,
    alarm: Alarm,
    verdict: Verdict,
    evidence: Evidence,
    weights: Mapping[str, Tensor] | None = None,
    missing: dict[str, str] | None = None,
) -> Path:
    """Write a report into a new folder ``step-<step>`` of ``folder``; return its path.

    A part that fails is left out, and named in the others.

    Args:
        folder: created if it does not exist.
        alarm: what was seen.
        verdict: its likely cause.
        evidence: the steps and measurements before.
        weights: written as ``last_good.pt`` if there are any.
        missing: what the report lacks already, and why. Parts that fail are added.

    Raises:
        Exception: if neither ``report.json`` nor ``report.md`` can be written.
    """
    missing = {} if missing is None else missing
    folder.mkdir(parents=True, exist_ok=True)
    # The name says what it is where a killed process leaves it behind.
    partial = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))

    def written(name: str, write: Callable[[Path], object]) -> bool:
        try:
            write(partial / "part")
            os.replace(partial / "part", partial / name)
        except Exception as error:
            missing[name] = why(error)
            with suppress(OSError):
                (partial / "part").unlink()
        return name not in missing

    def texts(figure: bool) -> None:
        def json_text(path: Path) -> None:
            path.write_text(_json(alarm, verdict, evidence, missing) + "\n", encoding="utf-8")

        def markdown_text(path: Path) -> None:
            text = markdown(alarm, verdict, evidence, figure=figure, missing=missing)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

        # Both are tried, and one of them is enough.
        if not (written("report.json", json_text) | written("report.md", markdown_text)):
            raise OSError(missing["report.json"])

    try:
        texts(figure=False)  # first, so that a full disk costs no figure
        wanted = importlib.util.find_spec("matplotlib") is not None
        has_figure = wanted and written("report.png", lambda path: _save(alarm, evidence, path))
        if weights is not None:
            written("last_good.pt", lambda path: torch.save(dict(weights), path))
        if has_figure or missing:
            texts(figure=has_figure)
        partial.chmod(0o755)
        path = _free(folder / f"step-{alarm.step}")
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def why(error: Exception) -> str:
    r"""Return an error in one line, and without the names of temporary files, which differ each time.

    >>> why(OSError(28, "No space left on device", "/tmp/x")), why(ValueError("so\n  long"))
    ('OSError: No space left on device', 'ValueError: so long')
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shorten(f"{type(error).__name__}: {text}", _LONGEST)


def _json(alarm: Alarm, verdict: Verdict, evidence: Evidence, missing: Mapping[str, str]) -> str:
    content = {
        "alarm": vars(alarm),
        "verdict": {**vars(verdict), "advice": verdict.advice},
        "evidence": evidence.to_dict(),
        "missing": missing,
    }
    return json.dumps(_strict(content), indent=1, allow_nan=False)


def _free(path: Path) -> Path:
    """Return ``path``, or one with a number where it is taken, as by an earlier run."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _strict(value: Any) -> Any:
    """Return ``value`` with ``None`` for what JSON has no number for, and words for other things."""
    if isinstance(value, Mapping):
        return {str(key): _strict(its) for key, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(its) for its in value]
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
    yield f"Likely cause: **{verdict.cause}**" + (
        f", in `{verdict.layer}`." if verdict.layer else "."
    )
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
        yield "| step | loss | sharpness / limit | non-uniformity / limit | most of the eigenvector |"
        yield "| ---: | ---: | ---: | ---: | --- |"
        for its in evidence.measured[-_SHOWN:]:
            held = ", ".join(
                f"`{name}` {share:.0%}" for name, share in list(its.shares.items())[:3]
            )
            margins = its.margins
            cells = (margins.loss, its.ratio, margins.non_uniformity_ratio)
            last = margins.failure or held
            yield f"| {its.step} | {' | '.join(map(_number, cells))} | {last} |"
        yield ""
    if evidence.steps:
        yield "## Steps"
        yield ""
        yield "| step | learning rate | loss | gradient norm | largest in | batch |"
        yield "| ---: | ---: | ---: | ---: | --- | --- |"
        for step in evidence.steps[-_SHOWN:]:
            norms = step.grad_norms
            largest = f"`{max(norms, key=lambda name: norms[name])}`" if norms else ""
            batch = "" if step.batch is None else ", ".join(map(str, step.batch[:8]))
            more = ", …" if step.batch is not None and len(step.batch) > 8 else ""
            cells = (step.lr, step.loss, _norm(step) if norms else None)
            yield f"| {step.step} | {' | '.join(map(_number, cells))} | {largest} | {batch}{more} |"
        yield ""


def _norm(step: StepRecord) -> float:
    """Return the norm of the gradient, that before clipping where it is known."""
    return step.grad_norm if step.total_norm is None else step.total_norm


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _save(alarm: Alarm, evidence: Evidence, path: Path) -> None:
    import matplotlib

    # What the user set, LaTeX included, is for the user's own figures.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        draw(alarm, evidence).savefig(path, format="png", dpi=120)


def draw(alarm: Alarm, evidence: Evidence) -> Figure:
    """Return the figure of a report: loss, margins, gradient norm and learning rate by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    steps, measured = evidence.steps, evidence.measured
    with_loss = [its for its in steps if its.loss is not None]
    probed = [its for its in measured if its.margins.loss is not None]
    _line(panels[0], [(its.step, its.loss) for its in with_loss], "batch", "#999999")
    _line(panels[0], [(its.step, its.margins.loss) for its in probed], "probe set", "#0072B2", "o-")
    for name, colour in (("edge_ratio", "#D55E00"), ("non_uniformity_ratio", "#009E73")):
        points = [(its.step, getattr(its.margins, name)) for its in measured]
        label = "sharpness" if name == "edge_ratio" else "non-uniformity"
        _line(panels[1], [(x, y) for x, y in points if y is not None], label, colour, "o-")
    panels[1].axhline(1.0, color="black", linestyle="--", linewidth=1, label="limit")
    _line(panels[2], [(its.step, _norm(its)) for its in steps if its.grad_norms], "", "#0072B2")
    _line(panels[3], [(its.step, its.lr) for its in steps], "", "#0072B2")
    titles = ("loss", "value / limit", "norm of the gradient", "learning rate")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.axvline(alarm.step, color="#CC79A7", linewidth=1)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize="small")
        drawn = [y for line in panel.get_lines()[:-1] for y in line.get_ydata()]
        positive = [y for y in drawn if 0 < y < math.inf]
        many = bool(positive) and max(positive) > _LOG_FROM * min(positive)
        if many and title != "learning rate":
            panel.set_yscale("log")
    for panel in panels[2:]:
        panel.set_xlabel("step")
    return figure


def _line(
    panel: Any, points: list[tuple[int, Any]], label: str, colour: str, style: str = "-"
) -> None:
    shown = [(x, y if math.isfinite(y) else math.nan) for x, y in points]
    if shown:
        x, y = zip(*shown, strict=True)
        panel.plot(x, y, style, color=colour, label=label, markersize=3, linewidth=1)
