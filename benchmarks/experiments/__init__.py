"""`experiment`: the experiments by name, each in a module or a folder of its own."""

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
"""In the order of the paper; those that go beyond it follow."""


def experiment(name: str) -> type[Experiment]:
    """Return the experiment with this name: the ``EXPERIMENT`` of its module.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r}: expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"benchmarks.experiments.{name.replace('-', '_')}")
    found: type[Experiment] = module.EXPERIMENT
    return found
