"""The batch size chooses the minimum: Figure 5 of the paper.

At one learning rate, SGD with smaller batches settles in minima that are flatter and more uniform,
below the bound √B/η on the non-uniformity; gradient descent is held by 2/η alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, ClassVar

from benchmarks.framework.experiment import Claim, Experiment, Rows, spread
from benchmarks.framework.plotting import plain_log
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution, grid, row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "BatchSize"]


@dataclass(frozen=True)
class BatchSize(Experiment):
    """Figure 5.

    Attributes:
        lr: learning rate of SGD and GD.
        batch_sizes: of SGD; GD is always run beside them.
        n: training images.
        target_loss: at which training stops.
        max_steps: at which it stops in any case.
    """

    name = "batch-size"
    shows = "Figure 5"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "batch-size": (
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

    def _solutions(self) -> list[Solution]:
        return grid(
            Dataset(self.data, self.n),
            lrs=(self.lr,),
            seeds=self.seeds,
            batch_sizes=(*self.batch_sizes, None),
            target_loss=self.target_loss,
            max_steps=self.max_steps,
        )

    def jobs(self) -> list[Job]:
        """Return a minimum for each batch size and seed."""
        return list(self._solutions())

    def tables(self, store: Store) -> dict[str, Rows]:
        """Return ``batch-size``."""
        return {"batch-size": [row(job, store) for job in filter(store.done, self._solutions())]}

    def draw(self, name: str, rows: Rows) -> Figure | None:
        """Return sharpness and non-uniformity against batch size, with their bounds."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        sharpness, non_uniformity = figure.subplots(1, 2)
        known = [r for r in rows if r["sharpness"] is not None]
        sizes = [r["batch_size"] or self.n for r in known]
        sharpness.plot(sizes, [r["sharpness"] for r in known], "o")
        sharpness.axhline(2 / self.lr, color="black", linestyle="--", linewidth=1, label="2/η")
        sharpness.set(ylabel="sharpness a", ylim=(0, None))
        non_uniformity.plot(sizes, [r["non_uniformity"] for r in known], "o")
        bounds = sorted(
            {(r["batch_size"], r["non_uniformity_limit"]) for r in rows if r["batch_size"]}
        )
        non_uniformity.plot(
            *zip(*bounds, strict=True), "k--", linewidth=1, label="√B/η, at finite n"
        )
        non_uniformity.set(ylabel="non-uniformity s", yscale="log")
        plain_log(non_uniformity.yaxis)
        for axes in (sharpness, non_uniformity):
            axes.set(xscale="log", xlabel=f"batch size B (GD at {self.n:,})")
            plain_log(axes.xaxis)
            axes.legend(frameon=False)
            axes.grid(alpha=0.25)
        figure.suptitle(f"{self.data}, η = {self.lr:g}")
        return figure

    def claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return that both fall with B, and that s keeps its bound."""
        rows = [r for r in tables["batch-size"] if r["sharpness"] is not None]
        by_size = {
            size: [r for r in rows if r["batch_size"] == size] for size in (*self.batch_sizes, None)
        }
        if not all(by_size.values()):
            return []
        claims = []
        for what, key in (("a, sharpness", "sharpness"), ("b, non-uniformity", "non_uniformity")):
            means = {size: mean(r[key] for r in of) for size, of in by_size.items()}
            ordered = list(means.values())
            claims.append(
                Claim(
                    what=f"Figure 5{what} against batch size",
                    printed="falls as B falls",
                    ours=", ".join(
                        f"{'GD' if size is None else f'B = {size}'}: {spread([r[key] for r in of])}"
                        for size, of in by_size.items()
                    ),
                    tolerance="in order, by means of seeds",
                    reproduced=ordered == sorted(ordered),
                )
            )
        smallest = by_size[min(self.batch_sizes)]
        bound = smallest[0]["non_uniformity_limit"]
        values = [r["non_uniformity"] for r in smallest]
        claims.append(
            Claim(
                what=f"Figure 5b, non-uniformity at B = {min(self.batch_sizes)} below √B/η",
                printed=f"at most {bound:.4g}",
                ours=spread(values),
                tolerance="none",
                reproduced=max(values) <= bound,
            )
        )
        return claims


EXPERIMENT = BatchSize
