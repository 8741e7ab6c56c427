"""`show`: an experiment's tables and claims on a terminal of 80 columns."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import Experiment, Tables
from benchmarks.framework.tables import cell

__all__ = ["LEGEND", "show"]

LEGEND = """\
a: sharpness, λmax of the Hessian · s: non-uniformity of the samples' Hessians
η: learning rate · B: batch size · stable only if a ≤ 2/η and s ≤ √B/η, about"""
"""The symbols in tables and claims."""

MAX_ROWS = 40
"""The most rows of a table that are printed."""

GAP = 3
"""Number of blanks between two columns."""

HEADINGS = {
    "lr": "η",
    "batch_size": "B",
    "sharpness": "a",
    "sharpness_limit": "limit of a",
    "sharpness_after": "a after",
    "non_uniformity": "s",
    "non_uniformity_limit": "limit of s",
    "non_uniformity_after": "s after",
    "critical_lr": "critical η",
    "preconditioned_sharpness": "a_P",
    "preconditioned_sharpness_limit": "limit of a_P",
    "escaped_at": "escaped",
    "settled_at": "settled",
    "test_accuracy": "accuracy",
    "test_accuracy_after": "accuracy after",
    "limit": "2/η",
    "said_escape_escaped": "hits",
    "said_escape_stayed": "false alarms",
    "said_stay_escaped": "missed",
    "said_stay_stayed": "stayed",
}


def show(console: Console, experiment: Experiment, tables: Tables) -> None:
    """Print the summary of the tables, and each claim."""
    summary = {name: frame for name, frame in experiment.summary(tables).items() if len(frame)}
    for name, frame in summary.items():
        _show_table(console, name.replace("-", " "), frame)
    claims = list(experiment.claims(tables)) if tables else []
    if claims:
        console.print(_claims(claims))


def _show_table(console: Console, title: str, frame: pd.DataFrame) -> None:
    rows = frame.head(MAX_ROWS)
    texts = {
        HEADINGS.get(name, name.replace("_", " ")): [cell(v) for v in rows[name].astype(object)]
        for name in frame
    }
    # Each column gets the width of its longest word; columns that do not fit are dropped. The
    # remaining room goes to the columns from the left.
    widths, room = {}, console.width + GAP
    for name, cells in texts.items():
        width = max(map(_longest_word, (name, *cells)))
        if room < width + GAP:
            break
        widths[name] = width
        room -= width + GAP
    lines = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, width in widths.items():
        extra = min(room, max(map(len, (name, *texts[name]))) - width)
        room -= extra
        lines.add_column(name, justify="right", width=width + extra)
    values = [texts[name] for name in widths]
    for row in zip(*values, strict=True):
        lines.add_row(*map(escape, row))
    console.print(lines, "", sep="\n")
    for extra, kind in ((len(frame) - len(rows), "rows"), (len(texts) - len(widths), "columns")):
        if extra:
            console.print(f"more {kind} in the CSV file: {extra}", highlight=False)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _claims(claims: list[Claim]) -> Table:
    lines = Table(title="Printed, predicted and observed", box=box.SIMPLE_HEAD, show_lines=True)
    lines.show_edge = lines.pad_edge = False
    for heading in ("", "claim", "printed", "theory", "ours"):
        lines.add_column(heading)
    for claim in claims:
        mark = "[green]✓[/green]" if claim.reproduced else "[red]✗[/red]"
        why = f" ({claim.why})" if claim.why else ""
        texts = (claim.what, claim.printed or "–", claim.theory or "–", claim.ours + why)
        lines.add_row(mark, *map(escape, texts))
    return lines
