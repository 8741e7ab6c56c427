"""Where measurements go. A sink is any callable that takes ``(step, record)``.

Four examples::

    sinks=[TensorBoardSink("runs/demo")]             # live charts, with their limits as bands
    sinks=[WandbSink(wandb.init(project="demo"))]    # a run of Weights & Biases
    sinks=[JSONLinesSink("runs/demo/margins.jsonl")] # one JSON object a line
    sinks=[lambda step, record: print(step, record["sharpness_ratio"])]

``record`` is what :meth:`~stableopt.stability.StabilityMargins.record` returns: every known number
by name, infinite limits included; a failed measurement has ``failed`` = 1 and no values. Where a
sink has a ``flush()``, the monitor calls it when it closes.

Steering sends its decisions too: records with ``decision`` = 1, what was changed ``_from`` and
``_to``, and to the ``note(step, text)`` of a sink that has one, the reason in words.
"""

from stableopt.sinks.json_lines import JSONLinesSink
from stableopt.sinks.tensorboard import TensorBoardSink
from stableopt.sinks.wandb import WandbSink

__all__ = ["JSONLinesSink", "TensorBoardSink", "WandbSink"]
