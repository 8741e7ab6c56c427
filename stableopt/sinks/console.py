"""`ConsoleSink`: a live table of the latest margins in the terminal."""

from __future__ import annotations

import atexit
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stableopt.sinks.events import Event, Measured
from stableopt.stability.layers.table import shortened
from stableopt.stability.measure.margins import StabilityMargins
from stableopt.stability.measure.measurement import level
from stableopt.stability.measure.registry import QUANTITIES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["ConsoleSink", "margins_table"]

_LAYERS = 3
"""Layers in the table: few, so that the table and the output of training fit on the screen."""

_COLOURS = {None: "", "inside": "green", "near": "yellow", "over": "red"}
"""Colours of the levels of a ratio."""


class ConsoleSink:
    """Shows the latest margins as a table that stays at the bottom of the terminal.

    The output of training appears above the table. The line below it is the last decision of steering,
    or the reason why the last measurement failed; the table then keeps the last successful one. If the
    output is not a terminal, but a pipe, a log file or most CI, nothing is shown. Next to a progress
    bar of tqdm or another display of rich, each measurement and decision is one line instead. The
    table ends with the monitor, or with the program.

    Args:
        console: a ``rich.console.Console``; by default one for standard error, so that the program's
            standard output can be piped.

    Raises:
        ImportError: without rich: ``pip install stableopt[console]``.

    >>> sink = ConsoleSink()
    >>> sink.receive(Measured(50, StabilityMargins(step=50, sharpness=15.0)))  # not in a terminal
    >>> sink.flush()
    """

    def __init__(self, console: Console | None = None) -> None:
        try:
            from rich.console import Console
        except ModuleNotFoundError as error:
            raise ImportError("ConsoleSink needs rich: pip install stableopt[console]") from error
        self.console = console or Console(stderr=True)
        self._live: Any = None
        self._margins, self._decision, self._failure = StabilityMargins(), "", ""

    def receive(self, event: Event) -> None:
        """Show the margins of a measurement, or the reason of a decision."""
        if not self.console.is_terminal:
            return
        from stableopt.sinks.terminal import progress_bars

        if isinstance(event, Measured):
            failure = event.margins.failure
            self._failure = f"step {event.step:,} failed: {failure}" if failure else ""
            if not failure or not self._margins.results:
                self._margins = event.margins
        else:
            self._decision = f"step {event.step:,}: {event.decision}"
        bars = progress_bars()
        if bars:
            self.flush()
        if self._live is None and (bars or not self._start()):
            text = one_line(event.margins) if isinstance(event, Measured) else self._decision
            self._print(text, bars)
            return
        note = self._failure or self._decision
        self._live.update(margins_table(self._margins, note), refresh=True)

    def flush(self) -> None:
        """End the live display; the table stays, and the next event starts another one."""
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self.flush)
            live.stop()

    def _start(self) -> bool:
        """Start the live display; return whether that was possible."""
        from rich.errors import LiveError
        from rich.live import Live

        from stableopt.sinks.terminal import other_display, redirect

        if other_display() is not None:
            return False
        live = Live(console=self.console, auto_refresh=False)
        try:
            live.start()
        except LiveError:
            return False
        self._live = live
        redirect(self.console, lambda: self._live is live, self.flush)
        # A program that does not close its monitor gets its cursor back.
        atexit.register(self.flush)
        return True

    def _print(self, text: str, bars: Sequence[Any]) -> None:
        """Print a line above progress bars and other displays."""
        from stableopt.sinks.terminal import other_display

        for bar in bars:
            bar.clear()
        stream = other_display()
        if stream is not None:
            print(text, file=stream)
        else:
            self.console.print(text, highlight=False, markup=False)
        for bar in bars:
            bar.refresh()

    def __repr__(self) -> str:
        return "ConsoleSink()"


def margins_table(margins: StabilityMargins, note: str = "") -> Table:
    """Return a rich table of one measurement: value, limit and ratio of each quantity.

    Below them are the three layers nearest to their limits, or without limits those with the largest
    shares of the top eigenvector.

    Args:
        margins: the measurement.
        note: a line below the table; a failed measurement shows the reason instead.

    >>> margins_table(StabilityMargins(step=50, sharpness=15.0, sharpness_limit=20.0)).row_count
    1
    """
    from rich.table import Table
    from rich.text import Text

    below = margins.failure or note or "; ".join(margins.failures.values())
    # The minimum width leaves room for title and caption, which rich wraps at the table's width.
    table = Table(title=_title(margins), caption=Text(below) if below else None, min_width=72)
    table.add_column("quantity", overflow="fold")
    for heading in ("value", "limit", "ratio"):
        table.add_column(heading, justify="right")
    for name, result in margins.results.items():
        if result.value is None and result.failure is None:
            continue
        value = "failed" if result.value is None else _number(result.value)
        table.add_row(QUANTITIES[name].title, value, _number(result.limit), _coloured(result.ratio))
    if margins.layers is not None:
        table.add_section()
        table.add_row(Text("layers (% of the top eigenvector)", style="italic"))
        for layer in margins.layers.largest(_LAYERS):
            share = "–" if layer.share is None else f"{100 * layer.share:.0f} %"
            row: list[Text | str] = [Text(f"{share:>5}  {shortened(layer.name, 28)}")]
            if layer.sharpness is not None:
                row += [_number(layer.sharpness), _number(layer.limit), _coloured(layer.ratio)]
            table.add_row(*row)
    return table


def _coloured(ratio: float | None) -> Text:
    from rich.text import Text

    return Text(_number(ratio), style=_COLOURS[None if ratio is None else level(ratio)])


def one_line(margins: StabilityMargins) -> str:
    """Return a measurement as one line of text.

    >>> one_line(StabilityMargins(step=50, loss=0.25, sharpness=15.0, sharpness_limit=20.0))
    'step 50, loss 0.25, sharpness 15 (0.75 of its limit)'
    """
    parts = [_title(margins)]
    for name, result in margins.results.items():
        if result.value is not None:
            ratio = "" if result.ratio is None else f" ({_number(result.ratio)} of its limit)"
            parts.append(f"{name.replace('_', ' ')} {_number(result.value)}{ratio}")
    if margins.failure:
        parts.append(margins.failure)
    return ", ".join(parts)


def _title(margins: StabilityMargins) -> str:
    values = {"loss": margins.loss, "learning rate": margins.lr, "batch size": margins.batch_size}
    known = [f"{name} {_number(value)}" for name, value in values.items() if value is not None]
    return ", ".join([f"step {margins.step:,}", *known])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return "none" if value == math.inf else f"{value:.4g}"
