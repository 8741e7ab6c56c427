"""Files of a run: the JSON lines of its measurements, and the report of an alarm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stableopt import JSONLinesSink
from stableopt.recorder import Alarm, Evidence, StepRecord, Verdict
from stableopt.recorder.evidence import MeasuredRecord
from stableopt.recorder.report import write_report
from stableopt.stability import StabilityMargins


def margins(step: int, ratio: float = 0.5, loss: float = 1.0, **more: Any) -> StabilityMargins:
    """Return margins with a loss, and a sharpness of ``ratio`` times its limit."""
    return StabilityMargins(
        step=step, lr=0.1, loss=loss, sharpness=20 * ratio, sharpness_limit=20.0, **more
    )


def write(folder: Path, *measured: StabilityMargins) -> Path:
    """Write measurements as JSON lines; return their file."""
    sink = JSONLinesSink(folder / "margins.jsonl")
    for its in measured:
        sink(its.step, its.record())
    return sink.path


def alarm(folder: Path, layer: str = "2", loss: float = 1.0) -> Path:
    """Write the report of an alarm at step 5, measured at steps 2 and 4 with a loss of ``loss``."""
    steps = [StepRecord(k, 0.1, 1.0 + k, {layer: 1.0}, [1, 2]) for k in range(1, 6)]
    measured = [MeasuredRecord(margins(k, 0.4 * k, loss), {layer: 0.9, "0": 0.1}) for k in (2, 4)]
    verdict = Verdict("layer", f"The loss rose in {layer}.", layer, 4)
    rose = Alarm("loss", 5, f"the loss of {layer} rose")
    return write_report(folder, rose, verdict, Evidence(steps, measured))
