"""Tables: what is written comes back, and a frame has the types of its file."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd

from benchmarks.framework.tables import read_table, records, table, write_table


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    """Catches a float that loses digits, a number that comes back as text, a name as a number, and
    ``None`` as a word; with commas, quotes and line breaks in the text.
    """
    rows = [
        {"lr": 0.1 + 0.2, "n": 3, "none": None, "yes": True, "text": 'a, "b"\nη', "tiny": 5e-324},
        {"lr": 1e300, "n": -7, "none": 1.5, "yes": False, "text": "B = 4", "tiny": 1 / 3},
    ]
    write_table(tmp_path / "a.csv", table(rows))
    read = records(read_table(tmp_path / "a.csv"))
    assert read == rows
    assert [list(map(type, row.values())) for row in read] == [
        list(map(type, row.values())) for row in rows
    ]
    with (tmp_path / "a.csv").open(newline="") as file:
        assert next(csv.reader(file)) == list(rows[0])


def test_a_table_of_rows_is_that_of_its_file(tmp_path: Path) -> None:
    """Catches tables whose types change when they are written and read.

    Missing values turn integers into floats, and a column may be empty.
    """
    content = table(
        {"B": size, "a": a, "name": name, "none": None}
        for size, a, name in ((4, 0.5, "x"), (None, None, None), (16, 2.0, "y"))
    )
    write_table(tmp_path / "a.csv", content)
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv"), content)
    assert str(content.dtypes["B"]) == "Int64"
    assert records(content)[1] == {"B": None, "a": None, "name": None, "none": None}
    assert not len(table([]))
