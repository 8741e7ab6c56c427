"""What follows L-BFGS: the gain of GD and SGD by steps, and L-BFGS's own limit."""

from benchmarks.experiments.after_lbfgs.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
