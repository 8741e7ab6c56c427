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

GAP = 3
"""Blanks between two columns."""

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
    # Text wraps between words, never within one; room that is left goes to columns from the left.
    widths, room = {}, console.width + GAP
    for name, cells in texts.items():
        least = max(map(_longest_word, (name, *cells)))
        if room < least + GAP:
            break
        widths[name] = least
        room -= least + GAP
    lines = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, least in widths.items():
        more = min(room, max(map(len, (name, *texts[name]))) - least)
        room -= more
        lines.add_column(name, justify="right", width=least + more)
    values = [texts[name] for name in widths]
    for row in zip(*values, strict=True):
        lines.add_row(*map(escape, row))
    console.print(lines, "", sep="\n")
    for more, what in ((len(its) - len(rows), "rows"), (len(texts) - len(widths), "columns")):
        if more:
            console.print(f"more {what} in the CSV file: {more}", highlight=False)


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
