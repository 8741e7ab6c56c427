"""Which rule predicts what SGD will do? Every rule against every outcome. Beyond the paper."""

from benchmarks.experiments.prediction.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
