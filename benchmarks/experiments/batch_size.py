"""The batch size chooses the minimum: Figure 5 of the paper.

At one learning rate, SGD with smaller batches settles in minima that are flatter and more uniform,
below the bound √B/η on the non-uniformity; gradient descent is limited by 2/η alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.framework.claims import Claim, at_most, increasing
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import finish, limit, panels, points
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import minima

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "BatchSize"]


@dataclass(frozen=True)
class BatchSize(Experiment):
    """Figure 5.

    Attributes:
        lr: learning rate of SGD and GD.
        batch_sizes: batch sizes of SGD; GD always runs too.
        n: number of training images.
        target_loss: training loss at which a run stops.
        max_steps: largest number of steps.
    """

    name = "batch-size"
    shows = "Figure 5"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "batch-size": (
            *("lr", "batch_size", "seed", "steps"),
            *("sharpness", "non_uniformity", "non_uniformity_limit"),
        )
    }
    presets: ClassVar = {
        ("smoke", ""): {"n": 100, "batch_sizes": (4, 25), "target_loss": 0.02},
        ("small", "digits"): {"seeds": (0, 1)},
        ("small", "fashion-mnist"): {"target_loss": 1e-4, "batch_sizes": (4, 25, 100)},
        ("small", "cifar10-2"): {"lr": 0.05, "batch_sizes": (4, 25, 100)},
        ("paper", "digits"): {"seeds": (0, 1, 2, 3, 4), "target_loss": 1e-4},
        ("paper", "fashion-mnist"): {"seeds": (0, 1, 2, 3, 4), "lr": 0.5, "target_loss": 1e-4},
        ("paper", "cifar10-2"): {"seeds": (0, 1, 2, 3, 4), "lr": 0.01, "target_loss": 1e-4},
    }

    lr: float = 0.5
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256)
    n: int = 1000
    target_loss: float = 1e-3
    max_steps: int = 1_000_000

    def cases(self) -> dict[str, list[Case]]:
        """Return a minimum for each batch size and seed."""
        sizes = (*self.batch_sizes, None)
        data = Dataset(self.data, self.n)
        return {"batch-size": minima(self, data, lrs=(self.lr,), batch_sizes=sizes)}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return sharpness and non-uniformity against batch size, with their bounds."""
        figure, axes = panels(2, width=4.5, height=3.6, title=f"{self.data}, η = {self.lr:g}")
        sizes = frame.batch_size.fillna(self.n)
        points(axes[0], sizes, frame.sharpness)
        limit(axes[0], y=2 / self.lr, label="2/η")
        points(axes[1], sizes, frame.non_uniformity)
        bounds: Any = frame.dropna(subset=["batch_size", "non_uniformity_limit"])
        bounds = bounds.drop_duplicates("batch_size").sort_values("batch_size")
        limit(axes[1], bounds.batch_size, bounds.non_uniformity_limit, "√B/η, at finite n")
        x = f"batch size B (GD at {self.n:,})"
        finish(axes[0], x, "sharpness a", log="x", ylim=(0, None))
        finish(axes[1], x, "non-uniformity s", log="xy")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the claims that both fall with B, and that s is below its bound."""
        minima = tables["batch-size"].dropna(subset="sharpness")
        by_size: dict[str, Any] = {
            f"B = {b}": minima[minima.batch_size == b] for b in self.batch_sizes
        }
        by_size["GD"] = minima[minima.batch_size.isna()]
        if not all(map(len, by_size.values())):
            return
        for panel, column in (
            ("a, sharpness", "sharpness"),
            ("b, non-uniformity", "non_uniformity"),
        ):
            yield increasing(
                f"Figure 5{panel} against batch size",
                {name: list(group[column]) for name, group in by_size.items()},
                printed="falls as B falls",
            )
        smallest = by_size[f"B = {min(self.batch_sizes)}"]
        yield at_most(
            f"Figure 5b, non-uniformity at B = {min(self.batch_sizes)}",
            smallest.non_uniformity,
            smallest.non_uniformity_limit.iloc[0],
            "√B/η",
            form=".3g",
        )


EXPERIMENT = BatchSize
