"""Where SGD is stable in the plane of sharpness and non-uniformity: Figure 3 of the paper."""

from benchmarks.experiments.diagram.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
