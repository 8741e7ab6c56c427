"""Checks that refuse a closed monitor, and a warning if training continues after it was closed.

Closing a monitor at the end of training is normal, before or after its recorder. So the warning waits
for a further step.
"""

from __future__ import annotations

from typing import Any

from stableopt._support.arguments import instance
from stableopt._support.warn_once import WarnOnce
from stableopt.monitor.monitor import StabilityMonitor

__all__ = ["StepsAfterClosing", "open_monitor", "warn_of_closed"]

_CLOSED = (
    "the monitor is closed, by close() or by a second track(): attach to the monitor that measures now,"
    " such as optimizer.monitor"
)


def open_monitor(monitor: Any) -> StabilityMonitor:
    """Return ``monitor`` if it is a monitor that still measures.

    Raises:
        TypeError: for another object.
        ValueError: for a closed monitor.
    """
    checked = instance("monitor", monitor, StabilityMonitor)
    if checked.closed:
        raise ValueError(_CLOSED)
    return checked


def warn_of_closed(warn: WarnOnce, what: str) -> None:
    """Warn once that ``what`` happened because its monitor was closed."""
    warn(what, _CLOSED)


class StepsAfterClosing:
    """Warns once if training goes on after its monitor was closed.

    Args:
        monitor: the monitor.
        what: what happens then, for the warning.
    """

    def __init__(self, monitor: StabilityMonitor, what: str) -> None:
        self._monitor, self._what = monitor, what
        self._warn = WarnOnce()
        self._step = -1

    def check(self) -> None:
        """Warn if this call, one after each step, is for a step that the monitor did not see.

        The first call after closing may be for the monitor's last step.
        """
        if self._monitor.closed and self._monitor.step == self._step:
            warn_of_closed(self._warn, f"{self._what} after step {self._step}")
        self._step = self._monitor.step
