"""The experiments, one module each."""

from __future__ import annotations

import importlib

from benchmarks.framework.experiment import Experiment

__all__ = ["NAMES", "experiment"]

NAMES = (
    "toy",
    "diagram",
    "loss-shape",
    "gd-sharpness",
    "batch-size",
    "selection",
    "correlation",
    "escape",
    "quasi-newton",
    "counterexample",
    "edge",
    "prediction",
    "steering",
    "control-laws",
)
"""In the order of the paper, and then what goes beyond it."""


def experiment(name: str) -> type[Experiment]:
    """Return the experiment of a name, which is the ``EXPERIMENT`` of its module.

    Raises:
        ValueError: for a name that there is not.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r}: expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"benchmarks.experiments.{name.replace('-', '_')}")
    found: type[Experiment] = module.EXPERIMENT
    return found
