"""`LiveStream`: a terminal stream that a live display of rich shares with progress bars. Needs rich."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, Any

from rich.console import Console
from rich.file_proxy import FileProxy

__all__ = ["LiveStream", "other_display", "progress_bars", "redirect"]


class LiveStream(FileProxy):
    """Prints lines above a live display, and ends the display when a progress bar draws.

    A progress bar redraws its line after a carriage return, and rich would print a new line each time.
    A bar keeps the stream that it was created with, so after the display has ended this stream passes
    everything to the plain one.

    Args:
        console: the console of the display.
        file: the plain stream.
        active: returns whether the display is live.
        end: ends the display.
    """

    def __init__(
        self, console: Console, file: IO[str], active: Callable[[], bool], end: Callable[[], None]
    ) -> None:
        super().__init__(console, file)
        self._active, self._end = active, end

    def write(self, text: str) -> int:
        """Write ``text``."""
        if self._active() and "\r" in text.replace("\r\n", "\n"):
            self._end()
        return super().write(text) if self._active() else self.rich_proxied_file.write(text)

    def flush(self) -> None:
        """Flush the display's buffer, or the plain stream."""
        if self._active():
            super().flush()
        else:
            self.rich_proxied_file.flush()


def redirect(console: Console, active: Callable[[], bool], end: Callable[[], None]) -> None:
    """Replace the streams that a live display of rich has redirected by `LiveStream` streams."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, LiveStream(console, stream.rich_proxied_file, active, end))


def other_display() -> Any:
    """Return a stream that prints above another display of rich; ``None`` without such a display."""
    streams = (sys.stderr, sys.stdout)
    return next((stream for stream in streams if isinstance(stream, FileProxy)), None)


def progress_bars() -> list[Any]:
    """Return tqdm's bars that are now shown in a terminal.

    >>> progress_bars()
    []
    """
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    # Bars under construction have no start time yet.
    return [bar for bar in list(bars) if hasattr(bar, "start_t") and bar.fp.isatty()]
