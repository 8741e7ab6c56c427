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
"""What the letters in tables and claims mean."""

MOST_ROWS = 40
"""Of a table on a terminal."""

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
    """Print the summary of the tables, and each claim with what is printed and predicted."""
    shown = {name: its for name, its in experiment.summary(tables).items() if len(its)}
    for name, its in shown.items():
        _show_table(console, name.replace("-", " "), its)
    claims = list(experiment.claims(tables)) if tables else []
    if claims:
        console.print(_claims(claims))


def _show_table(console: Console, title: str, its: pd.DataFrame) -> None:
    rows = its.head(MOST_ROWS)
    texts = {
        HEADINGS.get(name, name.replace("_", " ")): [cell(v) for v in rows[name].astype(object)]
        for name in its
    }
    # Headings wrap between words, and so do cells if the whole of them does not fit.
    widths = {name: max(_longest_word(name), *map(len, cells)) for name, cells in texts.items()}
    if sum(widths.values()) + 3 * len(widths) > console.width + 3:
        widths = {name: max(map(_longest_word, (name, *cells))) for name, cells in texts.items()}
    lines = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    room, values = console.width + 3, []
    for name, cells in texts.items():
        room -= widths[name] + 3
        if room < 0:
            break
        lines.add_column(name, justify="right", min_width=widths[name])
        values.append(cells)
    for row in zip(*values, strict=True):
        lines.add_row(*map(escape, row))
    console.print(lines, "", sep="\n")
    for more, what in ((len(its) - len(rows), "rows"), (len(texts) - len(values), "columns")):
        if more:
            console.print(f"and {more} more {what} in the CSV file", highlight=False)


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
