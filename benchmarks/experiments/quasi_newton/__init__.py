"""Quasi-Newton methods settle in sharper minima: Figure 9 of the paper, and other preconditioners."""

from benchmarks.experiments.quasi_newton.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
