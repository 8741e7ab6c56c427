"""Sinks: receivers of measurements and of decisions of steering.

Five examples::

    sinks=[TensorBoardSink("runs/demo")]             # live charts, with their limits as bands
    sinks=[WandbSink(wandb.init(project="demo"))]    # a run of Weights & Biases
    sinks=[JSONLinesSink("runs/demo/margins.jsonl")] # one JSON object a line
    sinks=[ConsoleSink()]                            # a live table in the terminal
    sinks=[lambda step, record: print(step, record["sharpness_ratio"])]

A sink is any callable that takes ``(step, record)``. The record of a measurement is the result of
:meth:`~stableopt.stability.StabilityMargins.record`: every known number by name, infinite limits
included; a failed measurement has ``failed`` = 1 and no values. The record of a decision has
``decision`` = 1, and the changed value as ``<name>_from`` and ``<name>_to``; the reason in words goes to
the sink's ``note(step, text)``, if it has that method. When the monitor closes, it calls the sink's
``flush()``, if it has that method.

A sink with a method ``receive(event)`` gets events instead: :class:`Measured`, with the margins and the
update rule, or :class:`Decided`, with the decision. Each has a ``step`` and a ``record()``.
"""

from stableopt.sinks.console import ConsoleSink
from stableopt.sinks.events import Decided, Event, Measured
from stableopt.sinks.json_lines import JSONLinesSink
from stableopt.sinks.tensorboard import TensorBoardSink
from stableopt.sinks.wandb import WandbSink

__all__ = [
    "ConsoleSink",
    "Decided",
    "Event",
    "JSONLinesSink",
    "Measured",
    "TensorBoardSink",
    "WandbSink",
]
