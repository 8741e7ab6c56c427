"""A flatter minimum that tests worse, with proof: the claim of the paper's Appendix B."""

from benchmarks.experiments.counterexample.experiment import EXPERIMENT

__all__ = ["EXPERIMENT"]
