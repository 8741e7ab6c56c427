"""Sinks: where measurements and decisions go.

Five examples::

    sinks=[TensorBoardSink("runs/demo")]             # live charts, with their limits as bands
    sinks=[WandbSink(wandb.init(project="demo"))]    # a run of Weights & Biases
    sinks=[JSONLinesSink("runs/demo/margins.jsonl")] # one JSON object a line
    sinks=[ConsoleSink()]                            # a live table in the terminal
    sinks=[lambda step, record: print(step, record["sharpness_ratio"])]

A sink is any callable that takes ``(step, record)``. The record of a measurement is what
:meth:`~stableopt.stability.StabilityMargins.record` returns: every known number by name, infinite
limits included; a failed measurement has ``failed`` = 1 and no values. The record of a decision of
steering has ``decision`` = 1, and what changed as ``_from`` and ``_to``; its reason in words goes to
the sink's ``note(step, text)``, if it has one. The monitor calls a sink's ``flush()``, if it has one,
when it closes.

A sink with a method ``receive(event)`` gets :class:`Measured` or :class:`Decided` instead: the margins
with the update rule, or the decision itself. Each has a ``step`` and a ``record()``.
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
