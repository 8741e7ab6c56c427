"""`experiment`: returns an experiment by its name; each has its own module or folder.

The paper's tables and figures are in

=====================  ==================================================
Figure 2               ``toy/``
Figure 3               ``diagram/``
Figure 4               ``loss_shape/``
Table 2                ``gd_sharpness.py``
Figure 5               ``batch_size.py``
Figure 6               ``selection.py``
Figure 7               ``correlation.py``
Figures 1, 8, Table 3  ``escape/``
Figure 9               ``quasi_newton/``
Appendix B             ``counterexample/``
beyond the paper       ``after_lbfgs/``, ``edge.py``, ``prediction/``, ``prediction_beyond.py``,
                       ``settling.py``, ``steering/``, ``control_laws/``
=====================  ==================================================
"""

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
    "after-lbfgs",
    "edge",
    "prediction",
    "prediction-beyond",
    "settling",
    "steering",
    "control-laws",
)
"""The paper's in its order, then those beyond the paper."""


def experiment(name: str) -> type[Experiment]:
    """Return the class of the experiment with this name, its module's ``EXPERIMENT``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r}: expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"benchmarks.experiments.{name.replace('-', '_')}")
    experiment_class: type[Experiment] = module.EXPERIMENT
    return experiment_class
