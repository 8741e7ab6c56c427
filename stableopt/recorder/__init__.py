"""The flight recorder: evidence of the last steps, alarms, verdicts, and the reports that it writes."""

from stableopt.recorder.alarms import Alarm, AlarmRules
from stableopt.recorder.evidence import Evidence, StepRecord
from stableopt.recorder.flight_recorder import FlightRecorder
from stableopt.recorder.verdict import Verdict, verdict

__all__ = [
    "Alarm",
    "AlarmRules",
    "Evidence",
    "FlightRecorder",
    "StepRecord",
    "Verdict",
    "verdict",
]
