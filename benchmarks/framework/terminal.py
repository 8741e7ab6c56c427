"""`show`: an experiment's tables and claims on a terminal of 80 columns."""

from __future__ import annotations

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
    "critical_lr": "critical η",
    "limit": "2/η",
}


def show(console: Console, experiment: Experiment, tables: Tables) -> None:
    """Print the summary of the tables, and each claim beside what is printed and predicted."""
    shown = {name: its for name, its in experiment.summary(tables).items() if len(its)}
    if shown:
        console.print(LEGEND, highlight=False)
    for name, its in shown.items():
        lines = Table(title=name.replace("-", " "))
        for column in its:
            heading = HEADINGS.get(column, column.replace("_", " "))
            # A heading wraps between words, never within one.
            longest = max(map(len, heading.split()))
            lines.add_column(heading, justify="right", min_width=longest)
        for row in its.head(MOST_ROWS).astype(object).itertuples(index=False):
            lines.add_row(*map(cell, row))
        console.print(lines)
        if len(its) > MOST_ROWS:
            console.print(f"and {len(its) - MOST_ROWS} more rows in the CSV file")
    claims = list(experiment.claims(tables)) if tables else []
    if claims:
        console.print(_claims(claims))


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
