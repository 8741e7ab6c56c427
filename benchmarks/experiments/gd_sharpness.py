"""The sharpness of gradient descent's minima: Table 2 of the paper.

Gradient descent trains to a small loss at several learning rates; its minima lie just below 2/η.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.framework.claims import Claim, all_of, at_most, close_to, spread
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import VERMILION, finish, limit, panels, points
from benchmarks.framework.tables import Row
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Minimum, minima
from benchmarks.training.spec import lost_runs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "GDSharpness"]

PRINTED: Mapping[str, Mapping[float, tuple[float, float | None]]] = {
    "fashion-mnist": {
        **{0.01: (53.5, 4.3), 0.05: (39.3, 0.5), 0.1: (19.6, 0.15)},
        **{0.5: (3.9, None), 1.0: (1.9, None), 5.0: (0.4, None)},
    },
    "cifar10-2": {0.01: (198.9, 0.6), 0.05: (39.8, 0.2), 0.1: (19.8, 0.1), 0.5: (3.6, 0.4)},
}
"""Table 2: by learning rate, the sharpness and the number behind its ±, if it has one."""

TOLERANCE = 0.05


@dataclass(frozen=True)
class GDSharpness(Experiment):
    """Table 2.

    Attributes:
        lrs: learning rates.
        slow_lrs: learning rates so small that training takes hours.
        slow_seeds: their seeds.
        n: number of training images.
        target_loss: training loss at which GD stops.
        max_steps: largest number of steps.
    """

    name = "gd-sharpness"
    shows = "Table 2"
    datasets = ("digits", "fashion-mnist", "cifar10-2")
    columns: ClassVar = {
        "sharpness": ("lr", "seed", "outcome", "steps", "sharpness", "limit", "printed")
    }
    presets: ClassVar = {
        ("smoke", ""): {"n": 100, "lrs": (1.0, 4.0, 500.0), "target_loss": 0.02},
        ("small", "digits"): {"seeds": (0, 1), "target_loss": 1e-3},
        ("small", "fashion-mnist"): {
            **{"seeds": (0, 1, 2, 3, 4), "lrs": (0.1, 0.5, 1.0, 5.0)},
            **{"slow_lrs": (0.05,), "slow_seeds": (0, 1)},
        },
        ("small", "cifar10-2"): {"lrs": (0.05, 0.1), "target_loss": 1e-3},
        ("paper", "digits"): {"seeds": (0, 1, 2, 3, 4)},
        ("paper", ""): {
            **{"seeds": (0, 1, 2, 3, 4), "lrs": (0.1, 0.5, 1.0, 5.0)},
            **{"slow_lrs": (0.01, 0.05), "slow_seeds": (0, 1)},
        },
    }

    lrs: tuple[float, ...] = (0.5, 1.0, 2.0)
    slow_lrs: tuple[float, ...] = ()
    slow_seeds: tuple[int, ...] = (0,)
    n: int = 1000
    target_loss: float = 1e-4
    max_steps: int = 1_000_000

    def cases(self) -> dict[str, list[Case]]:
        """Return a minimum for each learning rate and seed."""
        data = Dataset(self.data, self.n)
        slow = minima(self, data, lrs=self.slow_lrs, seeds=self.slow_seeds)
        return {"sharpness": [*slow, *minima(self, data, lrs=self.lrs)]}

    def rows(self, name: str, case: Case, minimum: Minimum, store: Store) -> Iterable[Row]:
        """Return a row with 2/η and the printed sharpness."""
        lr = case.job.lr
        yield {
            **{"lr": lr, "seed": case.job.seed, "outcome": minimum.outcome, "steps": minimum.steps},
            **{"loss": minimum.loss, "sharpness": minimum.sharpness, "limit": 2 / lr},
            "printed": self._printed(lr)[0],
            "non_uniformity": minimum.non_uniformity,
            "test_accuracy": minimum.test_accuracy,
        }

    def _printed(self, lr: float) -> tuple[float | None, float | None]:
        return PRINTED.get(self.data, {}).get(lr, (None, None))

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return sharpness against learning rate, with 2/η and the paper's values."""
        figure, (axes,) = panels()
        by_lr: Any = frame.drop_duplicates("lr").sort_values("lr")
        limit(axes, by_lr.lr, by_lr.limit, "2/η")
        points(axes, frame.lr, frame.sharpness, "here")
        printed = by_lr[by_lr.printed.notna()]
        if len(printed):
            points(axes, printed.lr, printed.printed, "the paper's Table 2", VERMILION, marker="x")
        finish(axes, "learning rate η", "sharpness a", log="xy")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield a claim per line of Table 2; on digits, which are not in it, the limit 2/η."""
        for lr, group in tables["sharpness"].groupby("lr"):
            values = list(group.sharpness.dropna())
            unreached = int((group.outcome != "reached").sum())
            why = f"{unreached} stopped above the target loss" if unreached else ""
            what = f"Table 2, sharpness of GD's minimum at η = {lr:g}"
            printed, printed_spread = self._printed(lr)
            lost = lost_runs(group.outcome)
            if lost:
                measured = [spread(values, ".4g")] if values else []
                texts = {"printed": "" if printed is None else f"{printed:g}"}
                yield all_of(what, [False], ours="; ".join([*measured, *lost]), **texts)
            elif printed is None:
                difference = f"{mean(values) * lr / 2 - 1:+.1%}"
                why = "; ".join(filter(None, [difference, why]))
                yield at_most(what, values, 2 / lr, "2/η", rel=TOLERANCE, of_mean=True, why=why)
            else:
                yield close_to(
                    what, values, printed, rel=TOLERANCE, printed_spread=printed_spread, why=why
                )


EXPERIMENT = GDSharpness
