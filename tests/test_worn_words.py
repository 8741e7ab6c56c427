"""The list of worn words that ``make lint`` keeps out of prose and code."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

worn_words = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "worn_words.py"))[
    "worn_words"
]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one\nNobody knows", [(2, "nobody")]),
        ("there is\n    no such thing", [(1, "is no")]),
        ("# there are\n# no such things", [(1, "are no")]),
        ("told = sinks[0]", [(1, "told")]),
        ("is not, besides, amended, retold, test_is_told_once", []),
    ],
    ids=["capital", "broken line", "broken comment", "identifier", "parts of words"],
)
def test_words_and_phrases_are_found_where_they_stand(
    text: str, found: list[tuple[int, str]]
) -> None:
    """Catches a phrase that hides behind a line break, and words that only contain a worn one."""
    assert worn_words(text) == found
