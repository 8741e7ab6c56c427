"""Figures of a run: the stability diagram, margins and layers over the steps, and spectra.

Five examples::

    plot.diagram(StabilityRegion(UpdateRule.from_optimizer(opt), batch_size=32), monitor.history)
    plot.diagram({"before": region, "after the change": other}, points)
    plot.margins(monitor.history).savefig("margins.png")
    plot.spectrum(margins)                  # of measure(..., quantities=("spectrum",))
    plot.layers(monitor.history, "share")

Figures do not use pyplot: they have no global state, open no window and need no closing, so a training
loop may draw them. The first call imports matplotlib.
"""

from stableopt.plot.canvas import to_rgb
from stableopt.plot.layer_map import layers
from stableopt.plot.over_steps import margins
from stableopt.plot.spectrum import spectrum
from stableopt.plot.trajectory import Region, diagram

__all__ = ["Region", "diagram", "layers", "margins", "spectrum", "to_rgb"]
