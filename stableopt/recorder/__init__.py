"""The flight recorder: evidence from the last steps, alarms, verdicts and reports."""

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
