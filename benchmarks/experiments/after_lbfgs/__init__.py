"""What follows L-BFGS: how accuracy grows with the steps of GD and SGD, and L-BFGS's own limit."""

from benchmarks.experiments.after_lbfgs.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
