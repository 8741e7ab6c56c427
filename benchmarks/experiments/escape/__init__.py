"""Escape from a sharp minimum: Figures 1 and 8, and Table 3, of the paper."""

from benchmarks.experiments.escape.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
