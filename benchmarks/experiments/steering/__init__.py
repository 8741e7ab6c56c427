"""Steering from a sharp minimum to named regions of the diagram, against baselines; and from scratch."""

from benchmarks.experiments.steering.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
