"""What the rules say before a run, against what SGD then does. Beyond the paper."""

from benchmarks.experiments.prediction.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
