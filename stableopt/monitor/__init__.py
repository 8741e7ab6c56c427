"""`StabilityMonitor`: measures stability margins during training and sends them to sinks."""

from stableopt.monitor.monitor import StabilityMonitor
from stableopt.sinks.delivery import Sink

__all__ = ["Sink", "StabilityMonitor"]
