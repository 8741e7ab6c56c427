"""`aligned`: rows of cells as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(rows: Sequence[Sequence[str]], *, flush_left: bool = True) -> list[str]:
    """Return rows with equally many cells as lines with columns of equal width, two spaces apart.

    Args:
        rows: the cells, a heading included.
        flush_left: whether the first column is flush left; all others are flush right.

    >>> aligned([["layer", "size"], ["0", "640"]])
    ['layer  size', '0       640']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]) if flush_left else first.rjust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return lines
