"""SGD leaves a minimum of one dimension in which gradient descent stays: Figure 2 of the paper."""

from benchmarks.experiments.toy.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
