"""`BesideLive`: a stream of a terminal with a live display, and the progress bars that share it.

Needs rich.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import IO, Any

from rich.console import Console
from rich.file_proxy import FileProxy

__all__ = ["BesideLive", "other_display", "progress_bars", "redirect"]


class BesideLive(FileProxy):
    """Prints lines above a live display, which ends where something draws a line over and over.

    rich would make a line of each drawing of a progress bar, which begins with a carriage return. A bar
    keeps the stream that it was made with, so once the display has ended the stream is the plain one.

    Args:
        console: of the display.
        file: the plain stream.
        active: whether the display is there.
        end: ends it.
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
        """Show what was written."""
        if self._active():
            super().flush()
        else:
            self.rich_proxied_file.flush()


def redirect(console: Console, active: Callable[[], bool], end: Callable[[], None]) -> None:
    """Replace the streams that a live display of rich has redirected by those that end it for a bar."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, BesideLive(console, stream.rich_proxied_file, active, end))


def other_display() -> Any:
    """Return the stream that prints above a display of rich that has redirected it, or ``None``."""
    return next((each for each in (sys.stderr, sys.stdout) if isinstance(each, FileProxy)), None)


def progress_bars() -> list[Any]:
    """Return tqdm's bars that are in a terminal now.

    >>> progress_bars()
    []
    """
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    # Half-made ones have no start yet.
    return [bar for bar in list(bars) if hasattr(bar, "start_t") and bar.fp.isatty()]
