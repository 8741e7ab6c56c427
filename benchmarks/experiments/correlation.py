"""Non-uniformity goes with sharpness: Figure 7 of the paper.

Minima found at several learning rates and batch sizes: their non-uniformity is roughly proportional
to their sharpness. On `cifar10` the network is a 14-layer ResNet and the images 10,000: batch norm
couples the samples of a batch in training, so the network is measured in evaluation mode, with
running statistics, where each sample has a Hessian of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks.framework.experiment import Claim, Experiment, Rows
from benchmarks.framework.plotting import plain_log
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution, grid, row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Correlation"]

PROPORTIONAL = 0.8
"""The least correlation of log a and log s that is called "roughly proportional"."""


@dataclass(frozen=True)
class Correlation(Experiment):
    """Figure 7.

    Attributes:
        lrs: learning rates.
        batch_sizes: of SGD.
        full_batch: run GD too.
        n: training images.
        target_loss: at which training stops.
        max_steps: at which it stops in any case.
        network: see :func:`benchmarks.training.networks.network`.
    """

    name = "correlation"
    shows = "Figure 7"
    datasets = ("digits", "fashion-mnist", "cifar10-2", "cifar10")
    columns: ClassVar = {
        "correlation": (
            "lr",
            "batch_size",
            "seed",
            "steps",
            "sharpness",
            "non_uniformity",
            "non_uniformity_limit",
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
            "n": 10_000,
            "network": "resnet",
            "lrs": (0.1, 0.5, 1.0),
            "batch_sizes": (100, 250, 1000),
            "full_batch": False,
            "target_loss": 1e-3,
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

    def _solutions(self) -> list[Solution]:
        return grid(
            Dataset(self.data, self.n),
            lrs=self.lrs,
            seeds=self.seeds,
            batch_sizes=(*self.batch_sizes, *([None] if self.full_batch else [])),
            target_loss=self.target_loss,
            max_steps=self.max_steps,
            network=self.network,
        )

    def jobs(self) -> list[Job]:
        """Return a minimum for each learning rate, batch size and seed."""
        return list(self._solutions())

    def tables(self, store: Store) -> dict[str, Rows]:
        """Return ``correlation``."""
        return {"correlation": [row(job, store) for job in filter(store.done, self._solutions())]}

    def draw(self, name: str, rows: Rows) -> Figure | None:
        """Return non-uniformity against sharpness, a colour for each batch size."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        known = [r for r in rows if r["non_uniformity"] is not None]
        sizes = {r["batch_size"] for r in known}
        for size in sorted(sizes, key=lambda size: size or math.inf):
            its = [r for r in known if r["batch_size"] == size]
            axes.plot(
                [r["sharpness"] for r in its],
                [r["non_uniformity"] for r in its],
                "o",
                label="GD" if size is None else f"B = {size}",
            )
        axes.set(xscale="log", yscale="log", xlabel="sharpness a", ylabel="non-uniformity s")
        plain_log(axes.xaxis, axes.yaxis)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25, which="both")
        axes.set_title(self.data)
        return figure

    def claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return the correlation of the logarithms with its confidence interval, and the slope."""
        from scipy.stats import linregress, pearsonr

        known = [r for r in tables["correlation"] if r["non_uniformity"] is not None]
        if len(known) < 4:
            return []
        a = [math.log(r["sharpness"]) for r in known]
        s = [math.log(r["non_uniformity"]) for r in known]
        found = pearsonr(a, s)
        low, high = found.confidence_interval()
        slope = linregress(a, s).slope
        return [
            Claim(
                what="Figure 7, non-uniformity against sharpness",
                printed="roughly proportional",
                ours=f"correlation of the logarithms {found.statistic:.3f} (95 %: {low:.3f} to"
                f" {high:.3f}), slope {slope:.2f}, {len(known)} minima",
                tolerance=f"correlation at least {PROPORTIONAL}",
                reproduced=bool(found.statistic >= PROPORTIONAL),
                why="proportional is slope 1",
            )
        ]


EXPERIMENT = Correlation
