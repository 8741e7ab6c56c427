"""Two parabolas and a minimum that SGD leaves and gradient descent does not: Figure 2 of the paper."""

from benchmarks.experiments.toy.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
