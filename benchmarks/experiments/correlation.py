"""Non-uniformity goes with sharpness: Figure 7 of the paper.

Over minima found at several learning rates and batch sizes, non-uniformity is roughly proportional to
sharpness. On `cifar10` the `paper` preset has a 14-layer ResNet and 10,000 images, and the `small` one a
small VGG and 1,000 images. In training the ResNet's batch norm couples the samples of a batch, so the
network is measured in evaluation mode, with running statistics, where each sample has its own Hessian.
Its sharpness is that of all images, its non-uniformity that of the first 1,000. Training ends at a loss
of 0.01, a tenth of the first one: between epochs the running statistics move the loss by half of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from benchmarks.framework.claims import Claim, at_least
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import coloured, finish, panels, points
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import minima

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Correlation"]

PROPORTIONAL = 0.8
"""Smallest correlation of log a and log s that counts as "roughly proportional"."""


@dataclass(frozen=True)
class Correlation(Experiment):
    """Figure 7.

    Attributes:
        lrs: learning rates.
        batch_sizes: batch sizes of SGD.
        full_batch: whether to run GD too.
        n: number of training images.
        target_loss: training loss at which a run stops.
        max_steps: largest number of steps.
        network: see :func:`benchmarks.training.networks.network`.
        sample: number of training images on which s is measured; ``None`` for all.
    """

    name = "correlation"
    shows = "Figure 7"
    datasets = ("digits", "fashion-mnist", "cifar10-2", "cifar10")
    columns: ClassVar = {
        "correlation": (
            *("lr", "batch_size", "seed", "steps"),
            *("sharpness", "non_uniformity", "non_uniformity_limit"),
        )
    }
    presets: ClassVar = {
        ("smoke", ""): {"n": 100, "lrs": (1.0, 2.0), "batch_sizes": (4, 25), "target_loss": 0.02},
        ("small", "digits"): {"seeds": (0, 1)},
        ("small", "fashion-mnist"): {
            "lrs": (0.5, 1.0),
            "batch_sizes": (4, 25, 100),
            "target_loss": 1e-4,
        },
        ("small", "cifar10-2"): {"lrs": (0.05,), "batch_sizes": (4, 25, 100), "full_batch": False},
        ("paper", "cifar10"): {
            **{"n": 10_000, "network": "resnet", "sample": 1000},
            "lrs": (0.1,),
            "batch_sizes": (25, 50, 100),
            "full_batch": False,
            "target_loss": 1e-2,
        },
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4), "target_loss": 1e-4},
        ("paper", "cifar10-2"): {
            "seeds": (0, 1, 2, 3, 4),
            "lrs": (0.01, 0.05, 0.1),
            "target_loss": 1e-4,
        },
    }

    lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    batch_sizes: tuple[int, ...] = (4, 16, 64)
    full_batch: bool = True
    n: int = 1000
    target_loss: float = 1e-3
    max_steps: int = 1_000_000
    network: str | None = None
    sample: int | None = None

    def cases(self) -> dict[str, list[Case]]:
        """Return a minimum for each learning rate, batch size and seed."""
        sizes = (*self.batch_sizes, *([None] if self.full_batch else []))
        data = Dataset(self.data, self.n)
        grid = {"lrs": self.lrs, "batch_sizes": sizes}
        return {"correlation": minima(self, data, **grid, network=self.network, sample=self.sample)}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return non-uniformity against sharpness, coloured by batch size."""
        figure, (axes,) = panels()
        names = frame.batch_size.map(lambda b: "GD" if pd.isna(b) else f"B = {b}")
        for label, colour in coloured(names):
            points(
                axes,
                frame.sharpness[names == label],
                frame.non_uniformity[names == label],
                label,
                colour,
            )
        finish(axes, "sharpness a", "non-uniformity s", log="xy", title=self.data)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the correlation of the logarithms, with its confidence interval and the slope."""
        from scipy.stats import linregress, pearsonr

        minima = tables["correlation"].dropna(subset="non_uniformity")
        if len(minima) < 4:
            return
        a, s = np.log(minima.sharpness), np.log(minima.non_uniformity)
        correlation = pearsonr(a, s)
        low, high = correlation.confidence_interval()
        yield at_least(
            "Figure 7, non-uniformity against sharpness",
            [float(correlation.statistic)],
            PROPORTIONAL,
            printed="roughly proportional",
            theory="",
            ours=f"correlation of the logarithms {correlation.statistic:.3f} (95 %: {low:.3f} to"
            f" {high:.3f}), slope {linregress(a, s).slope:.2f}, {len(minima)} minima",
            tolerance=f"correlation at least {PROPORTIONAL}",
            why="proportional is slope 1",
        )


EXPERIMENT = Correlation
