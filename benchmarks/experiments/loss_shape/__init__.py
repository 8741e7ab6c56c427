"""The loss around its minima: how far a quadratic, and none for cross-entropy. Figure 4 of the paper."""

from benchmarks.experiments.loss_shape.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
