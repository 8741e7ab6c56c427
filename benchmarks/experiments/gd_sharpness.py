"""The sharpness of gradient descent's minima: Table 2 of the paper.

Gradient descent trains to a small loss at several learning rates; its minima lie just below 2/η.
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
from benchmarks.training.minimum import Solution, grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "GDSharpness"]

PRINTED = {
    "fashion-mnist": {0.01: 53.5, 0.05: 39.3, 0.1: 19.6, 0.5: 3.9, 1.0: 1.9, 5.0: 0.4},
    "cifar10-2": {0.01: 198.9, 0.05: 39.8, 0.1: 19.8, 0.5: 3.6},
}
SPREADS = {
    "fashion-mnist": {0.01: 4.3, 0.05: 0.5, 0.1: 0.15},
    "cifar10-2": {0.01: 0.6, 0.05: 0.2, 0.1: 0.1, 0.5: 0.4},
}
"""Behind the ± in Table 2, where there is one."""

TOLERANCE = 0.05


@dataclass(frozen=True)
class GDSharpness(Experiment):
    """Table 2.

    Attributes:
        lrs: learning rates.
        n: training images.
        target_loss: at which GD stops.
        max_steps: at which it stops in any case.
    """

    name = "gd-sharpness"
    shows = "Table 2"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "sharpness": (
            "lr",
            "seed",
            "outcome",
            "steps",
            "sharpness",
            "limit",
            "printed",
            "test_accuracy",
        )
    }
    presets: ClassVar = {
        ("smoke", ""): {"n": 100, "lrs": (1.0, 4.0, 500.0), "target_loss": 0.02},
        ("small", "digits"): {"seeds": (0, 1), "target_loss": 1e-3},
        ("small", "fashion-mnist"): {"lrs": (0.1, 0.5, 1.0, 5.0)},
        ("small", "cifar10-2"): {"lrs": (0.05, 0.1), "target_loss": 1e-3},
        ("paper", "digits"): {"seeds": (0, 1, 2, 3, 4)},
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4), "lrs": (0.01, 0.05, 0.1, 0.5, 1.0, 5.0)},
    }

    lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    n: int = 1000
    target_loss: float = 1e-4
    max_steps: int = 1_000_000

    def _solutions(self) -> list[Solution]:
        return grid(
            Dataset(self.data, self.n),
            lrs=self.lrs,
            seeds=self.seeds,
            target_loss=self.target_loss,
            max_steps=self.max_steps,
        )

    def jobs(self) -> list[Job]:
        """Return a minimum for each rate and seed."""
        return list(self._solutions())

    def tables(self, store: Store) -> dict[str, Rows]:
        """Return ``sharpness``."""
        rows = []
        for job in filter(store.done, self._solutions()):
            found = store.result(job)
            rows.append(
                {
                    "lr": job.lr,
                    "seed": job.seed,
                    "outcome": found["outcome"],
                    "steps": found["steps"],
                    "loss": found["loss"],
                    "sharpness": found.get("sharpness"),
                    "limit": 2 / job.lr,
                    "printed": PRINTED.get(self.data, {}).get(job.lr),
                    "non_uniformity": found.get("non_uniformity"),
                    "test_accuracy": found.get("test_accuracy"),
                }
            )
        return {"sharpness": rows}

    def draw(self, name: str, rows: Rows) -> Figure | None:
        """Return sharpness against learning rate, with 2/η and the paper's values."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        known = [row for row in rows if row["sharpness"] is not None]
        lrs = sorted({row["lr"] for row in rows})
        axes.plot(lrs, [2 / lr for lr in lrs], "k--", linewidth=1, label="2/η")
        axes.plot(
            [row["lr"] for row in known], [row["sharpness"] for row in known], "o", label="here"
        )
        printed = sorted({(row["lr"], row["printed"]) for row in rows if row["printed"]})
        if printed:
            axes.plot(
                *zip(*printed, strict=True), "x", color="#D55E00", label="the paper's Table 2"
            )
        axes.set(xscale="log", yscale="log", xlabel="learning rate η", ylabel="sharpness a")
        plain_log(axes.xaxis, axes.yaxis)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        return figure

    def claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return Table 2 line by line; on digits, which it has not, the limit itself."""
        claims = []
        for lr in self.lrs:
            rows = [r for r in tables["sharpness"] if r["lr"] == lr and r["sharpness"] is not None]
            if not rows:
                continue
            values = [row["sharpness"] for row in rows]
            printed = PRINTED.get(self.data, {}).get(lr)
            away = mean(values) / (printed or 2 / lr) - 1
            unreached = sum(row["outcome"] != "reached" for row in rows)
            same = abs(away) <= TOLERANCE if printed else away <= TOLERANCE
            behind = SPREADS.get(self.data, {}).get(lr)
            claims.append(
                Claim(
                    what=f"Table 2, sharpness of GD's minimum at η = {lr:g}",
                    printed=_plus_minus(printed, behind)
                    if printed
                    else f"at most 2/η = {2 / lr:g}",
                    ours=spread(values, ".4g"),
                    tolerance=f"{TOLERANCE:.0%}",
                    reproduced=same,
                    why=f"{away:+.1%}"
                    + (f"; {unreached} stopped above the target loss" if unreached else ""),
                )
            )
        return claims


def _plus_minus(value: float, behind: float | None) -> str:
    return f"{value:g}" if behind is None else f"{value:g} ± {behind:g}"


EXPERIMENT = GDSharpness
