"""What the terminal shows: 80 columns, whole words, each claim with its printed value and theory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import benchmarks
from benchmarks.experiments import experiment
from benchmarks.framework.tables import read_table
from benchmarks.framework.terminal import HEADINGS, LEGEND, show

PUBLISHED = sorted((Path(benchmarks.__file__).parent / "results").glob("*/*/*/about.json"))


@pytest.mark.parametrize("about", PUBLISHED, ids=["-".join(p.parts[-4:-1]) for p in PUBLISHED])
def test_published_results_fit_a_terminal(about: Path) -> None:
    """Catches a heading cut within a word, a line of more than 80 columns, and a claim, printed value
    or prediction that is not shown.
    """
    content = json.loads(about.read_text())
    published = experiment(content["experiment"]).from_json(content["settings"])
    tables = {path.stem: read_table(path) for path in about.parent.glob("*.csv")}
    console = Console(file=io.StringIO(), width=80)
    show(console, published, tables)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in (text + LEGEND).splitlines())
    assert "…" not in text
    for name, rows in published.summary(tables).items():
        title = name.replace("-", " ")
        assert title in text
        shown = text.split(title)[1].split("─" * 10)[0]  # its headings
        expected = " ".join(HEADINGS.get(c, c.replace("_", " ")) for c in rows).split()
        assert set(shown.split()) <= {*expected}, (shown, expected)
    words = set(text.replace("│", " ").replace("┃", " ").split())
    for claim in published.claims(tables):
        for part in (claim.what, claim.printed, claim.theory, claim.ours):
            assert words.issuperset(part.split()), text
