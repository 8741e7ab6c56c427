"""The loss around its minima, a quadratic or vanishing with cross-entropy: Figure 4 of the paper."""

from benchmarks.experiments.loss_shape.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
