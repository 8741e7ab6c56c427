"""The edge of stability: sharpness rises to 2/η, and SGD settles at its own threshold. Beyond the paper.

Gradient descent's sharpness along the way, for several learning rates (Cohen et al., 2021): it
rises until it is at 2/η, and stays about there. SGD has an edge too: where training by SGD ends,
the learning rate is set beside the exact mean-square threshold of that place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from benchmarks.framework.experiment import Claim, RowExperiment, Rows
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution
from benchmarks.training.threshold import Thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Edge"]

AT_THE_EDGE = 0.1
"""How far the largest sharpness may be from 2/η to be called at it: it swings by a few per cent."""

SETTLED = 1.1
"""The largest learning rate / threshold at which SGD is said to have settled within it: the threshold is
that of iid batches in the Gauss-Newton form, and training ends at a small loss, not at none."""


@dataclass(frozen=True)
class Edge(RowExperiment):
    """Sharpness along the way, and where SGD settles.

    Attributes:
        lrs: learning rates of gradient descent.
        n: its training images.
        target_loss: at which it stops.
        max_steps: at which it stops in any case.
        sharpness_every: steps between two measurements.
        sgd_lrs: learning rates of SGD; none where nC is too large for the exact threshold.
        batch_sizes: of SGD.
        sgd_n: its training images: few, since the exact threshold takes time as (nC)^3.
        sgd_target_loss: at which it stops.
    """

    name = "edge"
    shows = "Beyond the paper"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "sharpness": (),
        "settled": ("lr", "batch_size", "seed", "sharpness", "critical_lr", "ratio"),
    }
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 50,
            "lrs": (2.0,),
            "target_loss": 1e-2,
            "sharpness_every": 50,
            "sgd_lrs": (1.0,),
            "batch_sizes": (2,),
            "sgd_n": 16,
            "sgd_target_loss": 1e-2,
        },
        ("small", "fashion-mnist"): {"lrs": (1.0, 5.0), "sharpness_every": 100},
        ("small", "cifar10-2"): {
            "lrs": (0.05, 0.1),
            "n": 200,
            "target_loss": 1e-2,
            "max_steps": 2000,
            "sharpness_every": 50,
            "sgd_lrs": (),
        },
        ("paper", ""): {
            "seeds": (0, 1, 2, 3, 4),
            "lrs": (0.1, 0.5, 1.0, 5.0),
            "target_loss": 1e-4,
            "sgd_n": 120,
        },
        ("paper", "cifar10-2"): {
            "seeds": (0, 1, 2, 3, 4),
            "lrs": (0.01, 0.05, 0.1),
            "target_loss": 1e-4,
            "sgd_n": 500,
        },
    }

    lrs: tuple[float, ...] = (1.0, 2.0, 4.0)
    n: int = 1000
    target_loss: float = 1e-3
    max_steps: int = 1_000_000
    sharpness_every: int = 100
    sgd_lrs: tuple[float, ...] = (0.5, 1.0)
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    sgd_n: int = 64
    sgd_target_loss: float = 1e-4

    def _descents(self) -> list[Solution]:
        return [
            Solution(
                Dataset(self.data, self.n),
                lr=lr,
                seed=self.seeds[0],
                target_loss=self.target_loss,
                max_steps=self.max_steps,
                non_uniformity=False,
                sharpness_every=self.sharpness_every,
            )
            for lr in self.lrs
        ]

    def _settled(self) -> list[Thresholds]:
        return [
            Thresholds(
                Solution(
                    Dataset(self.data, self.sgd_n),
                    lr=lr,
                    seed=seed,
                    batch_size=size,
                    target_loss=self.sgd_target_loss,
                    max_steps=200_000,
                ),
                (size,),
            )
            for lr in self.sgd_lrs
            for size in self.batch_sizes
            for seed in self.seeds
        ]

    def jobs(self) -> list[Job]:
        """Return gradient descents, and the thresholds where SGD ends."""
        return [*self._descents(), *self._settled()]

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``sharpness`` along the way, and ``settled``."""
        along = [
            {
                "lr": job.lr,
                "step": record["step"],
                "loss": record["loss"],
                "sharpness": record["sharpness"],
                "limit": 2 / job.lr,
            }
            for job in filter(store.done, self._descents())
            for record in store.trace(job)
            if "sharpness" in record
        ]
        settled = []
        for job in filter(store.done, self._settled()):
            start, size = job.start, job.batch_sizes[0]
            threshold = store.result(job).at(size)
            found = store.result(start)
            settled.append(
                {
                    "lr": start.lr,
                    "batch_size": size,
                    "seed": start.seed,
                    "outcome": found.outcome,
                    "loss": found.loss,
                    "sharpness": found.sharpness,
                    "non_uniformity": found.non_uniformity,
                    "critical_lr": threshold.critical_lr,
                    "theorem1": threshold.theorem1,
                    "ratio": start.lr / threshold.critical_lr,
                    "sharpness_ratio": found.sharpness * start.lr / 2,
                }
            )
        return {"sharpness": along, "settled": settled}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return sharpness against η times steps, and the ratios to the thresholds."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.5, 4), layout="constrained")
        axes = figure.subplots()
        if name == "sharpness":
            for number, lr in enumerate(dict.fromkeys(r["lr"] for r in rows)):
                its = [r for r in rows if r["lr"] == lr]
                axes.plot(
                    [r["step"] * lr for r in its],
                    [r["sharpness"] for r in its],
                    color=f"C{number}",
                    label=f"η = {lr:g}",
                )
                axes.axhline(2 / lr, color=f"C{number}", linestyle="--", linewidth=1)
            axes.set(xscale="log", xlabel="η × steps", ylabel="sharpness a, limits 2/η")
            axes.set_ylim(0, 1.5 * max(r["limit"] for r in rows))
        else:
            for number, lr in enumerate(dict.fromkeys(r["lr"] for r in rows)):
                its = [r for r in rows if r["lr"] == lr]
                sizes = [r["batch_size"] for r in its]
                style = {"color": f"C{number}", "linestyle": "none"}
                axes.plot(
                    sizes, [r["ratio"] for r in its], marker="o", label=f"η = {lr:g}: η/η*", **style
                )
                axes.plot(
                    sizes,
                    [r["sharpness_ratio"] for r in its],
                    marker="x",
                    label=f"η = {lr:g}: ηa/2",
                    **style,
                )
            axes.axhline(1, color="black", linestyle="--", linewidth=1)
            axes.set(xscale="log", xlabel="batch size B", ylabel="η / its limit, where SGD settled")
            axes.set_ylim(0, None)
            axes.set_xticks(self.batch_sizes, [str(size) for size in self.batch_sizes])
            axes.minorticks_off()
        axes.set_title(self.data)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        return figure

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return that sharpness gets to 2/η, and that SGD settles within its threshold."""
        return [*_rises(tables["sharpness"]), *_settles(tables.get("settled", []))]


def _rises(rows: Rows) -> Iterator[Claim]:
    for lr in dict.fromkeys(r["lr"] for r in rows):
        its = [r for r in rows if r["lr"] == lr]
        ends = [r["sharpness"] / r["limit"] for r in its[-3:]]
        last = sum(ends) / len(ends)
        yield Claim(
            what=f"Sharpness of GD at η = {lr:g} ends at 2/η",
            printed="1 (Cohen et al.)",
            ours=f"{last:.3f} of 2/η, from {its[0]['sharpness'] / its[0]['limit']:.3f} at the start;"
            f" at most {max(r['sharpness'] / r['limit'] for r in its):.2f}",
            tolerance=f"{AT_THE_EDGE:.0%}",
            reproduced=abs(last - 1) <= AT_THE_EDGE,
            why=f"loss {its[-1]['loss']:.1e} at the end",
        )


def _settles(rows: Rows) -> Iterator[Claim]:
    known = [r for r in rows if r["outcome"] == "reached"]
    if not known:
        return
    ratios = [r["ratio"] for r in known]
    alone = [
        r["sharpness_ratio"]
        for r in known
        if r["batch_size"] == min(s["batch_size"] for s in known)
    ]
    yield Claim(
        what="SGD settles where its learning rate is below the exact threshold",
        printed="η/η* at most 1",
        ours=f"η/η* from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} runs",
        tolerance=f"{SETTLED - 1:.0%}",
        reproduced=max(ratios) <= SETTLED,
        why=f"ηa/2 is {min(alone):.2f} to {max(alone):.2f} at the smallest batch",
    )


EXPERIMENT = Edge
