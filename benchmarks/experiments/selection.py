"""Whatever the initialisation, the non-uniformity ends below its bound: Figure 6 of the paper.

SGD at one learning rate, from initialisations U[-v/√n_in, v/√n_in] of several scales v; each
minimum's non-uniformity beside the bound √B/η of its batch size.
"""

from __future__ import annotations

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

__all__ = ["EXPERIMENT", "Selection"]


@dataclass(frozen=True)
class Selection(Experiment):
    """Figure 6.

    Attributes:
        lr: learning rate of SGD.
        batch_sizes: of SGD.
        scales: v of the initialisation.
        n: training images.
        target_loss: at which training stops.
        max_steps: at which it stops in any case.
    """

    name = "selection"
    shows = "Figure 6"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "selection": (
            "scale",
            "batch_size",
            "seed",
            "steps",
            "non_uniformity",
            "non_uniformity_limit",
        )
    }
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 100,
            "batch_sizes": (4, 25),
            "scales": (1.0, 2.0),
            "target_loss": 0.02,
        },
        ("small", "digits"): {"seeds": (0, 1)},
        ("small", "fashion-mnist"): {"scales": (1.0, 2.0, 3.0)},
        ("small", "cifar10-2"): {"lr": 0.05, "scales": (0.5, 1.0, 1.5)},
        ("paper", "digits"): {"seeds": (0, 1, 2, 3, 4), "target_loss": 1e-4},
        ("paper", "fashion-mnist"): {
            "seeds": (0, 1, 2, 3, 4),
            "scales": (1.0, 2.0, 3.0),
            "batch_sizes": (4, 9, 25, 64, 100),
            "target_loss": 1e-4,
        },
        ("paper", "cifar10-2"): {
            "seeds": (0, 1, 2, 3, 4),
            "lr": 0.01,
            "batch_sizes": (4, 9, 25, 64, 100),
            "scales": (0.5, 1.0, 1.5),
            "target_loss": 1e-4,
        },
    }

    lr: float = 0.5
    batch_sizes: tuple[int, ...] = (4, 25, 100)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    n: int = 1000
    target_loss: float = 1e-3
    max_steps: int = 1_000_000

    def _solutions(self) -> list[Solution]:
        return grid(
            Dataset(self.data, self.n),
            lrs=(self.lr,),
            seeds=self.seeds,
            batch_sizes=self.batch_sizes,
            scales=self.scales,
            target_loss=self.target_loss,
            max_steps=self.max_steps,
        )

    def jobs(self) -> list[Job]:
        """Return a minimum for each scale, batch size and seed."""
        return list(self._solutions())

    def tables(self, store: Store) -> dict[str, Rows]:
        """Return ``selection``."""
        return {"selection": [row(job, store) for job in filter(store.done, self._solutions())]}

    def draw(self, name: str, rows: Rows) -> Figure | None:
        """Return the non-uniformity against batch size for each scale, below the bound."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.4 * len(self.scales), 3.4), layout="constrained")
        for axes, scale in zip(
            figure.subplots(1, len(self.scales), sharey=True, squeeze=False)[0],
            self.scales,
            strict=True,
        ):
            its = [r for r in rows if r["scale"] == scale]
            known = [r for r in its if r["non_uniformity"] is not None]
            axes.plot([r["batch_size"] for r in known], [r["non_uniformity"] for r in known], "o")
            bounds = sorted({(r["batch_size"], r["non_uniformity_limit"]) for r in known})
            if bounds:
                axes.plot(*zip(*bounds, strict=True), "k--", linewidth=1, label="√B/η, at finite n")
            axes.set(xscale="log", yscale="log", xlabel="batch size B", title=f"v = {scale:g}")
            plain_log(axes.xaxis, axes.yaxis)
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("non-uniformity s")
        figure.axes[0].legend(frameon=False)
        figure.suptitle(f"{self.data}, η = {self.lr:g}")
        return figure

    def claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return that every point is below its line, with those that are not."""
        rows = tables["selection"]
        known = [r for r in rows if r["non_uniformity"] is not None]
        if not known:
            return []
        above = [r for r in known if r["non_uniformity"] > r["non_uniformity_limit"]]
        lost = [r for r in rows if r["outcome"] == "diverged"]
        worst = max(r["non_uniformity"] / r["non_uniformity_limit"] for r in known)
        told = [
            f"v = {r['scale']:g}, B = {r['batch_size']}, seed {r['seed']}:"
            f" {r['non_uniformity'] / r['non_uniformity_limit']:.2f} of the bound"
            for r in above
        ]
        if lost:
            told.append(f"{len(lost)} diverged and have no point")
        return [
            Claim(
                what="Figure 6, non-uniformity of SGD's minima",
                printed="every point below its dashed line √B/η",
                ours=f"{len(known) - len(above)} of {len(known)} below; largest s / bound {worst:.2f}",
                tolerance="none",
                reproduced=not above,
                why="; ".join(told),
            )
        ]


EXPERIMENT = Selection
