"""Steering from a sharp minimum to named regions of the diagram, against baselines; and from scratch.

Beyond the paper. Gradient descent trains to a sharp minimum. From there the controller is told a
region: flatter, more uniform, both, or sharper. What it reaches is set beside a fixed learning rate
and batch size, a grid-searched schedule, a rate by curvature (CDAT) and a batch size by the noise
scale. Nothing but the regions is tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from benchmarks.experiments.steering import report
from benchmarks.experiments.steering.case import Budget
from benchmarks.experiments.steering.job import Steered
from benchmarks.framework.experiment import Claim, RowExperiment, Rows
from benchmarks.runner import Job, Store
from benchmarks.training.data import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Steering"]

IN_THE_PLANE = ("more uniform", "both")
"""Regions that bound the non-uniformity, the way to which is drawn in the diagram."""


@dataclass(frozen=True)
class Steering(RowExperiment, Budget):
    """Regions and rivals.

    Attributes:
        n: training images.
        random_labels: how many of them get a random label.

    The others are those of :class:`~benchmarks.experiments.steering.case.Budget`.
    """

    name = "steering"
    shows = "beyond the paper"
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 60, "start_loss": 0.06, "steps": 20, "sgd_steps": 20, "batch_size": 16},
            **{"measure_every": 4, "grid_lrs": (1.5, 2.0), "grid_ramps": (1,)},
            **{"scratch_steps": 20, "scratch_lrs": (0.1,)},
        },
        ("small", "digits"): {
            **{"seeds": (0, 1), "sgd_steps": 2000, "grid_lrs": (1.5, 2.0, 4.0)},
            **{"grid_ramps": (1,), "scratch_lrs": (0.1, 0.5)},
        },
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4)},
    }

    n: int = 200
    random_labels: int = 0

    def _steered(self) -> list[Steered]:
        data = Dataset(self.data, self.n, self.random_labels)
        budget = Budget(**{field.name: getattr(self, field.name) for field in fields(Budget)})
        return [Steered(data, seed, budget) for seed in self.seeds]

    def jobs(self) -> list[Job]:
        """Return everything from each seed's minimum."""
        return list(self._steered())

    def row_tables(self, store: Store) -> dict[str, Rows]:
        """Return ``summary``, ``runs``, ``paths``, and the paths to regions in the plane."""
        runs, paths = [], []
        for job in filter(store.done, self._steered()):
            found = store.result(job)
            runs += found["runs"]
            targets = {row["region"]: row for row in found["runs"] if row["method"] == "steered"}
            keys = ("least_sharpness", "target_sharpness", "aim")
            keys += ("least_non_uniformity", "target_non_uniformity")
            paths += [
                {"region": region, "seed": job.seed, **row}
                | {key: targets[region][key] for key in keys}
                for region, its in found["paths"].items()
                for row in its
            ]
        return {
            "summary": report.summary(runs),
            "runs": runs,
            "paths": paths,
            **{
                f"diagram-{name.replace(' ', '-')}": [r for r in paths if r["region"] == name]
                for name in IN_THE_PLANE
            },
        }

    def row_summary(self, tables: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return the summary."""
        return {"where-each-ended": tables["summary"]}

    def row_draw(self, name: str, rows: Rows) -> Figure | None:
        """Return the ways of the first seed."""
        if name == "paths":
            return report.draw_sharpness(rows)
        return report.draw_diagram(rows) if name.startswith("diagram") else None

    def row_claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return which regions were reached."""
        return report.claims(tables.get("runs", []))


EXPERIMENT = Steering
