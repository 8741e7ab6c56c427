"""`ConsoleSink`: the live table in the terminal."""

from __future__ import annotations

import io
import math
import os
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import stableopt
from stableopt import ConsoleSink, StabilityMargins
from stableopt.sinks import Decided, Measured
from stableopt.sinks.console import margins_table
from stableopt.stability import Layers, QuantityResult


class Decision:
    def record(self) -> dict[str, float]:
        return {"decision": 1.0}

    def __str__(self) -> str:
        return "raise lr from 0.1 to 0.2 [bold]: below the target"


def terminal(**options: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, **options)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(margins: StabilityMargins, note: str = "") -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(margins_table(margins, note))
    return written(console).splitlines()


MARGINS = StabilityMargins(
    step=1250,
    lr=0.1,
    batch_size=16,
    loss=0.0123,
    sharpness=15.0,
    sharpness_limit=20.0,
    non_uniformity=45.0,
    non_uniformity_limit=math.inf,
)


def test_a_row_has_value_limit_and_ratio_in_eighty_columns() -> None:
    """Catches a column that is cut, an infinite limit as a number, and a title of another step."""
    lines = rows(MARGINS)
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "step 1,250, loss 0.0123, learning rate 0.1, batch size 16"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [["sharpness", "15", "20", "0.75"], ["non-uniformity", "45", "none", "0"]]


@pytest.mark.parametrize(
    ("value", "colour"), [(17.9, "32"), (18.1, "33"), (20.1, "33"), (20.3, "31")]
)
def test_the_colour_is_that_of_the_ratio(value: float, colour: str) -> None:
    """Catches a run beyond its edge in green: 32 is green, 33 yellow, 31 red."""
    console = terminal(color_system="standard")
    console.print(margins_table(StabilityMargins(sharpness=value, sharpness_limit=20.0)))
    assert f"\x1b[{colour}m" in written(console)


def test_a_failure_leaves_the_last_margins() -> None:
    """Catches a failure that empties the table, and a reason that outlasts the failure."""
    sink = ConsoleSink(terminal())
    sink.receive(Measured(1250, MARGINS))
    sink.receive(Measured(1300, StabilityMargins(step=1300, failure="the loss is nan")))
    sink.flush()
    failed = written(sink.console)
    last = failed[failed.rindex("quantity") :]
    assert "15" in last
    assert "step 1,300 failed: the loss is nan" in last
    sink.receive(Measured(1350, MARGINS))
    sink.flush()
    assert "nan" not in written(sink.console)[len(failed) :]


def test_failures_and_decisions_are_below_the_table() -> None:
    """Catches a failure shown as a run without limits, and a reason interpreted as markup."""
    assert "the loss is nan" in rows(StabilityMargins(failure="the loss is nan"))[-1]
    sink = ConsoleSink(terminal())
    sink.receive(Measured(50, MARGINS))
    sink.receive(Decided(50, Decision()))
    sink.flush()
    assert "step 50: raise lr from 0.1 to 0.2 [bold]: below the target" in written(sink.console)


def test_the_live_table_is_replaced_and_prints_stay_above() -> None:
    """Catches a table for each measurement, and prints that tear it."""
    console = terminal()
    sink = ConsoleSink(console)
    for step in (10, 20):
        sink.receive(Measured(step, StabilityMargins(step=step, sharpness=float(step))))
    console.print("a line of the user")
    sink.flush()
    sink.flush()
    text = written(console)
    # Moves the cursor up over the old table, at each update.
    assert "\x1b[1A" in text
    assert text.rindex("step 20") > text.index("a line of the user") > text.index("step 10")


def test_the_largest_layers_are_below_the_margins() -> None:
    """Catches all layers at once, the order of the model, and long names that break the width."""
    names = ("embed", *(f"transformer.blocks.{k}.attention.projection" for k in range(9)))
    columns = {
        "share": tuple(0.02 * k for k in range(10)),
        "sharpness": tuple(float(k) for k in range(10)),
        "limit": (4.0,) * 10,
    }
    result = QuantityResult(15.0, layers=Layers(names, (8,) * 10, columns))
    lines = rows(StabilityMargins(step=50, results={"sharpness": result}))
    assert max(map(len, lines)) <= 80
    shown = [line for line in lines if "projection" in line]
    assert [line.split()[-2] for line in shown] == ["2.25", "2", "1.75"]
    assert "18 %" in shown[0]
    shares = QuantityResult(15.0, layers=Layers(("a",), (1,), {"share": (1.0,)}))
    (line,) = (x for x in rows(StabilityMargins(results={"sharpness": shares})) if "100 %" in x)
    assert "–" not in line


def test_where_there_is_no_terminal_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches control characters in a log file."""
    console = Console(file=io.StringIO())
    sink = ConsoleSink(console)
    sink.receive(Measured(10, MARGINS))
    sink.flush()
    assert written(console) == ""


def test_beside_a_progress_bar_each_measurement_is_a_line() -> None:
    """Catches rich's error that only one display may be live, by which every measurement is lost."""
    console = terminal()
    sink = ConsoleSink(console)
    with Progress(console=console) as progress:
        progress.add_task("training")
        sink.receive(Measured(1250, MARGINS))
    text = written(console)
    assert "step 1,250" in text
    assert "sharpness" in text


SCRIPT = """
from rich.progress import Progress
from tqdm import tqdm
from stableopt import ConsoleSink, StabilityMargins
from stableopt.sinks import Measured

sink = ConsoleSink()
def see(step):
    sink.receive(Measured(step, StabilityMargins(step=step, sharpness=1.0)))
see(1)
print("a print")
for k in tqdm(range(4), desc="BAR", mininterval=0):
    if k == 2:
        see(2)
with Progress() as progress:
    progress.add_task("training")
    see(3)
see(4)  # and the program ends
"""


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
def test_progress_bars_stay_one_line_and_the_cursor_comes_back() -> None:
    """Catches a progress bar and a live table that break each other's lines.

    Also catches a hidden cursor after a program that does not close its monitor.
    """
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    # Rows, columns, and pixels, that nothing here reads.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        parts = []
        with suppress(OSError):  # Linux's end of file
            while part := os.read(ours, 65536):
                parts.append(part)
    os.close(ours)
    assert process.returncode == 0
    text = b"".join(parts).decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 3  # two tables, and rich's bar
    lines = text.replace("\r\n", "\n").split("\n")
    # One until the line of step 2, and one after it.
    assert len([line for line in lines if "BAR" in line]) == 2
    assert any(line.endswith("\rstep 2, sharpness 1") for line in lines)
    assert any(line.endswith("step 3, sharpness 1") for line in lines)
    assert text.index("a print") < text.index("BAR")
    assert len([line for line in lines if "quantity" in line]) >= 2


def test_in_training(recwarn: pytest.WarningsRecorder) -> None:
    """Catches a sink that the monitor cannot use, and a display that outlives it."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
    sink = ConsoleSink(terminal())
    optimizer = stableopt.SGD(model.parameters(), lr=0.1)
    optimizer.track(model, nn.MSELoss(), (x, y), every=1, sinks=[sink])
    for _ in range(3):
        optimizer.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        optimizer.step()
    assert optimizer.monitor is not None
    optimizer.monitor.close()
    text = written(sink.console)
    assert all(f"step {step}" in text for step in (1, 2, 3))
    assert "\x1b[?25h" in text  # the cursor is back
    assert not recwarn.list


def test_without_rich_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import error that does not say what to install."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"pip install stableopt\[console\]"):
        ConsoleSink()
