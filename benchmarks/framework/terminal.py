"""`show`: an experiment's tables and claims on a terminal of 80 columns."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import Experiment, Tables
from benchmarks.framework.tables import cell

__all__ = ["LEGEND", "show"]

LEGEND = (
    "a: sharpness, λmax of the Hessian (GD is stable up to 2/η) · s: non-uniformity of the"
    " samples' Hessians (SGD: about √B/η) · η: learning rate · B: batch size"
)

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
    "test_accuracy_after": "accuracy after",
    "critical_lr": "critical η",
    "limit": "2/η",
}


def show(console: Console, experiment: Experiment, tables: Tables) -> None:
    """Print the summary of the tables, and each claim with what is printed and predicted."""
    shown = {name: its for name, its in experiment.summary(tables).items() if len(its)}
    if shown:
        console.print(LEGEND, highlight=False)
    for name, its in shown.items():
        _show_table(console, name.replace("-", " "), its)
    claims = list(experiment.claims(tables)) if tables else []
    if claims:
        console.print(_claims(claims))


def _show_table(console: Console, title: str, its: pd.DataFrame) -> None:
    lines, room, rows = Table(title=title), console.width - 1, its.head(MOST_ROWS)
    columns = {}
    for name in its:
        heading = HEADINGS.get(name, name.replace("_", " "))
        cells = [cell(value) for value in rows[name].astype(object)]
        # Text wraps between words, never within one.
        width = max(len(word) for text in (heading, *cells) for word in text.split() or [""])
        room -= width + 3
        if room < 0:
            break
        columns[name] = cells
        lines.add_column(heading, justify="right", min_width=width)
    for values in zip(*columns.values(), strict=True):
        lines.add_row(*map(escape, values))
    console.print(lines)
    for more, what in (
        (len(its) - len(rows), "rows"),
        (len(its.columns) - len(columns), "columns"),
    ):
        if more:
            console.print(f"and {more} more {what} in the CSV file", highlight=False)


def _claims(claims: list[Claim]) -> Table:
    lines = Table(title="Printed, predicted and observed", show_lines=True, expand=False)
    for heading in ("", "claim", "printed", "theory", "ours"):
        lines.add_column(heading)
    for claim in claims:
        mark = "[green]✓[/green]" if claim.reproduced else "[red]✗[/red]"
        why = f" ({claim.why})" if claim.why else ""
        texts = (claim.what, claim.printed or "–", claim.theory or "–", claim.ours + why)
        lines.add_row(mark, *map(escape, texts))
    return lines
