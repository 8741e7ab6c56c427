"""`write_report`: a report as JSON, Markdown and a figure, in a folder that appears as a whole."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stableopt.recorder.alarms import Alarm
from stableopt.recorder.evidence import Evidence, StepRecord
from stableopt.recorder.finding import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "markdown", "write_report"]

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
) -> Path:
    """Write a report into a new folder ``step-<step>`` of ``folder``; return its path.

    Args:
        folder: created if it does not exist.
        alarm: what was seen.
        verdict: its likely cause.
        evidence: the steps and measurements before.
        weights: written as ``last_good.pt`` if there are any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The name says what it is where a killed process leaves it behind.
    partial = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        content = {
            "alarm": vars(alarm),
            "verdict": {**vars(verdict), "advice": verdict.advice},
            "evidence": evidence.to_dict(),
        }
        text = json.dumps(_strict(content), indent=1, allow_nan=False)
        (partial / "report.json").write_text(text + "\n", encoding="utf-8")
        has_figure = importlib.util.find_spec("matplotlib") is not None
        if has_figure:
            draw(alarm, evidence).savefig(partial / "report.png", dpi=120)
        (partial / "report.md").write_text(
            markdown(alarm, verdict, evidence, figure=has_figure), encoding="utf-8"
        )
        if weights is not None:
            torch.save(dict(weights), partial / "last_good.pt")
        partial.chmod(0o755)
        path = _free(folder / f"step-{alarm.step}")
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _free(path: Path) -> Path:
    """Return ``path``, or one with a number where it is taken, as by an earlier run."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _strict(value: Any) -> Any:
    """Return ``value`` with ``None`` for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _strict(its) for key, its in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(alarm: Alarm, verdict: Verdict, evidence: Evidence, *, figure: bool = True) -> str:
    """Return the report as Markdown.

    >>> text = markdown(Alarm("loss", 9, "the loss rose"), Verdict("unknown", "The loss rose."),
    ...                 Evidence([], []))
    >>> text.splitlines()[0]
    '# Step 9: the loss rose'
    """
    return "\n".join(_lines(alarm, verdict, evidence, figure)) + "\n"


def _lines(alarm: Alarm, verdict: Verdict, evidence: Evidence, figure: bool) -> Iterator[str]:
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
    _line(panels[2], [(its.step, _norm(its)) for its in steps], "", "#0072B2")
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
