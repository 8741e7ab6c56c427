"""Tables of results as DataFrames, and the CSV files that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

__all__ = ["Row", "cell", "read_table", "records", "table", "write_table"]

Row = Mapping[str, Any]
"""Numbers and strings by column; ``None`` where a value is missing."""

OLD = tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1)
EXACT = {"float_precision": "round_trip"} if OLD else {}
"""Arguments to read back exactly the number that was written, the default from pandas 3.1 on."""


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return rows as a DataFrame with the dtypes that its CSV file would give.

    >>> frame = table([{"B": 4, "a": 0.5}, {"B": None, "a": None}])
    >>> frame.dtypes.astype(str).to_dict()
    {'B': 'Int64', 'a': 'float64'}
    """
    rows = list(rows)
    if not rows:
        return pd.DataFrame()
    return _read(StringIO(pd.DataFrame(rows, dtype=object).to_csv(index=False)))


def read_table(path: Path) -> pd.DataFrame:
    """Return the table of a CSV file; integer columns with missing values stay integers."""
    return _read(path)


def write_table(path: Path, content: pd.DataFrame) -> None:
    """Write a table as CSV, atomically; missing values become empty fields."""
    partial = path.with_suffix(".partial")
    content.astype(object).to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)


def _read(source: Any) -> pd.DataFrame:
    frame = pd.read_csv(
        source,
        keep_default_na=False,
        na_values=[""],
        dtype_backend="numpy_nullable",
        **EXACT,
    )
    # Missing floats are NaN, which matplotlib skips, instead of pd.NA.
    return frame.astype(dict.fromkeys(frame.select_dtypes("Float64"), "float64"))


def records(content: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows as dictionaries of Python scalars; missing values are ``None``."""
    plain = content.astype(object)
    return plain.where(content.notna(), None).to_dict("records")


def cell(value: Any) -> str:
    """Return the text of ``value`` in the terminal's tables.

    >>> cell(0.123456), cell(None), cell(12), cell("B = 4")
    ('0.1235', '–', '12', 'B = 4')
    """
    if pd.isna(value):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
