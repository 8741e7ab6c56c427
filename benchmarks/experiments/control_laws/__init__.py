"""Control laws that fail, and the one that works: why the learning rate follows the target."""

from benchmarks.experiments.control_laws.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
