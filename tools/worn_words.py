"""Finds worn words in prose and code, and suggests plain ones: ``python tools/worn_words.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLAIN = {
    "mend": "repair",
    "mends": "repairs",
    "mended": "repaired",
    "anew": "again",
    "whom": "who, or another sentence",
    "for ever": "forever, or for good",
    "foretell": "predict",
    "told": "reported, given, warned",
    "is no": "is not a, has no",
    "are no": "are not, have no",
    "beside": "next to, with, besides",
    "whatever": "any, whichever, every",
    "of which": "whose, or another sentence",
    "in place of": "instead of",
    "nobody": "no one, or name the reader",
    "nothing but": "only",
}
# A phrase may span two lines, also of a comment.
WORN = re.compile(r"\b(" + "|".join(PLAIN).replace(" ", r"(?:\s|\n\s*#)+") + r")\b", re.IGNORECASE)
EXEMPT = ("tools/worn_words.py", "tests/test_worn_words.py", "benchmarks/REPORT.md")


def worn_words(text: str) -> list[tuple[int, str]]:
    """Return the line number and the text of each worn word or phrase."""
    return [
        (text.count("\n", 0, match.start()) + 1, re.sub(r"[\s#]+", " ", match[0].lower()))
        for match in WORN.finditer(text)
    ]


def main() -> int:
    """Print the worn words in all tracked Python and Markdown files; return whether there are any."""
    root = Path(__file__).parents[1]
    files = subprocess.check_output(["git", "ls-files", "*.py", "*.md"], cwd=root, text=True)
    findings = [
        f"{name}:{line}: '{word}': better {PLAIN[word]}"
        for name in files.splitlines()
        if name not in EXEMPT and (root / name).exists()
        for line, word in worn_words((root / name).read_text())
    ]
    print("\n".join(findings) or "No worn words.")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
