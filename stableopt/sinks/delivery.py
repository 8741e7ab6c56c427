"""`deliver`: sends an event to every sink; a failing sink gives a warning and never stops training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from stableopt._support.arguments import shown
from stableopt._support.warn_once import WarnOnce
from stableopt.sinks.events import Decided, Event

__all__ = ["EventSink", "Sink", "check_sinks", "deliver", "flush"]


@runtime_checkable
class EventSink(Protocol):
    """A sink that takes events rather than records."""

    def receive(self, event: Event) -> Any:
        """Take ``event``."""


Sink: TypeAlias = Callable[[int, dict[str, float]], Any] | EventSink
"""A callable that takes ``(step, record)``, or an :class:`EventSink`; either may have a ``flush()``,
which the monitor calls when it closes."""


def check_sinks(sinks: Any) -> list[Sink]:
    """Return ``sinks``, one sink or an iterable of them, as a list.

    Raises:
        TypeError: for anything that is not a sink.
    """
    if callable(sinks) or isinstance(sinks, EventSink):
        sinks = [sinks]
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"sinks={shown(sinks)}: expected a list of callables (step, record)")
    listed = list(sinks)
    for sink in listed:
        if isinstance(sink, type) or not (callable(sink) or isinstance(sink, EventSink)):
            raise TypeError(f"sinks: {sink!r} is not a callable (step, record)")
    return listed


def deliver(event: Event, sinks: Iterable[Sink], warn: WarnOnce) -> None:
    """Send ``event`` to each sink; warn of a sink that fails.

    A sink with ``receive`` gets the event. Any other sink is called with the step and a fresh record;
    its ``note(step, text)``, if it has one, gets the reason of a decision. A sink may add and remove
    sinks: this event still goes to those that were there.
    """
    for sink in tuple(sinks):
        try:
            if isinstance(sink, EventSink):
                sink.receive(event)
                continue
            sink(event.step, event.record())
            note = getattr(sink, "note", None)
            if isinstance(event, Decided) and callable(note):
                note(event.step, str(event.decision))
        except Exception as error:
            warn(f"the sink {type(sink).__name__} failed", f"{type(error).__name__}: {error}")


def flush(sinks: Iterable[Sink], warn: WarnOnce) -> None:
    """Call ``flush()`` of each sink that has one; warn of a failure.

    An error raised here would hide the error that ends a ``with`` block.
    """
    for sink in tuple(sinks):
        flush_sink = getattr(sink, "flush", None)
        if callable(flush_sink):
            try:
                flush_sink()
            except Exception as error:
                warn(f"the sink {type(sink).__name__} failed to flush", repr(error))
