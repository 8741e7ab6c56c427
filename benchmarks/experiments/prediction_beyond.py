"""Which rule predicts SGD with momentum, Adam's step, a CNN and a transformer? Beyond the paper.

The question of `prediction` in five settings that the paper does not treat. On the fully connected
network: heavy-ball momentum of 0.9, Nesterov's, and gradients times Adam's preconditioner, held fixed.
Plain SGD on a small CNN with group norm, and on a transformer block. Learning rates are fractions of the
largest that is stable without noise. Batches are drawn independently, as in the theory. The minima are
split into halves: the best threshold on η/B is fitted on one half, and all rules are judged on the
other. The rules from theory have nothing to fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from benchmarks.experiments.prediction.experiment import LEAST_CASES, as_row
from benchmarks.experiments.prediction.rules import calibration, confusion
from benchmarks.experiments.prediction.trial import Outcome, Trial
from benchmarks.framework.claims import Claim, all_of
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import coloured, finish, limit, panels, trace
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution
from benchmarks.training.threshold import Thresholds
from benchmarks.training.update import Update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "PredictionBeyond"]

AHEAD = 0.03
"""Margin in accuracy by which the exact threshold must beat the best other rule."""

RIGHT = 0.97
"""Accuracy that it must reach."""


@dataclass(frozen=True)
class Setting:
    """A network, the learning rates that find its minima, and the update rule from there."""

    network: str | None
    lrs: tuple[float, ...]
    update: Update


MLP = (0.25, 0.5, 1.0, 2.0)

SETTINGS = {
    "heavy ball": Setting(None, MLP, Update(momentum=0.9)),
    "Nesterov": Setting(None, MLP, Update(momentum=0.9, nesterov=True)),
    "Adam's P": Setting(None, MLP, Update(adaptive=True)),
    "CNN": Setting("cnn", (0.03, 0.05, 0.08, 0.12), Update()),
    "transformer": Setting("transformer", (0.2, 0.3, 0.4, 0.5), Update()),
}
"""The learning rates of the gradient descents range up to the largest at which each network trains, so
that the minima differ in sharpness."""


@dataclass(frozen=True)
class PredictionBeyond(Experiment):
    """Confusion matrices and a calibration curve for each setting.

    Attributes:
        kinds: names of :data:`SETTINGS`.
        n: number of training images.
        target_loss: training loss at which gradient descent stops.
        batch_sizes: batch sizes of SGD.
        fractions: learning rates, relative to the largest that is stable without noise.
        steps: number of steps within which a run must escape.
    """

    name = "prediction-beyond"
    shows = "Beyond the paper"
    datasets = ("digits",)
    columns: ClassVar = {"cases": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "kinds": ("heavy ball",),
            "seeds": (0, 1),
            "n": 8,
            "target_loss": 3e-3,
            "batch_sizes": (1, 4),
            "fractions": (0.1, 1.2),
            "steps": 100,
        },
        ("small", ""): {"seeds": (0, 1, 2, 3)},
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4, 5), "n": 120, "steps": 4000},
    }

    kinds: tuple[str, ...] = tuple(SETTINGS)
    n: int = 64
    target_loss: float = 3e-5
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    fractions: tuple[float, ...] = (0.03, 0.08, 0.2, 0.4, 0.7, 1.1)
    steps: int = 1000

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an unknown setting."""
        super().__post_init__()
        for name in self.kinds:
            if name not in SETTINGS:
                raise ValueError(f"kinds: {name!r}, expected one of {', '.join(SETTINGS)}")

    def cases(self) -> dict[str, list[Case]]:
        """Return a trial for each setting, minimum, batch size and fraction."""
        cases = []
        for name in self.kinds:
            for start in self._minima(SETTINGS[name]):
                thresholds = Thresholds(start, self.batch_sizes, SETTINGS[name].update)
                half = "fix" if start.seed % 2 == 0 else "judge"
                for size, fraction in itertools.product(self.batch_sizes, self.fractions):
                    trial = Trial(thresholds, fraction, size, self.steps, independent=True)
                    keys = {"setting": name, "minimum_lr": start.lr, "seed": start.seed}
                    cases.append(Case(trial, {**keys, "batch_size": size, "half": half}))
        return {"cases": cases}

    def _minima(self, setting: Setting) -> list[Solution]:
        data = Dataset(self.data, self.n)
        shared: dict[str, Any] = {"target_loss": self.target_loss, "network": setting.network}
        return [
            Solution(data, lr=lr, seed=seed, max_steps=60_000, **shared)
            for lr in setting.lrs
            for seed in self.seeds
        ]

    def rows(self, name: str, case: Case, outcome: Outcome, store: Store) -> Iterable[Row]:
        """Return each rule's prediction, and what SGD did."""
        yield {**case.keys, **as_row(outcome)}

    def derived(self, tables: Tables) -> Tables:
        """Return ``confusion`` and ``calibration`` on the judging half of each setting."""
        if "cases" not in tables:
            return {}
        confusions, curves = [], []
        for name, group in tables["cases"].groupby("setting", sort=False):
            fix, judge = group[group.half == "fix"], group[group.half == "judge"]
            if not len(fix) or not len(judge):
                continue
            for row in confusion(judge, fixed_on=fix):
                row.pop("sampling")
                confusions.append({"setting": name, **row})
            curves += [{"setting": name, **row} for row in calibration(judge)]
        derived = {"confusion": table(confusions), "calibration": table(curves)}
        return {name: content for name, content in derived.items() if len(content)}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return the fraction of runs that escape against η/η*."""
        if name != "calibration":
            return None
        figure, (panel,) = panels(1, width=6.0)
        for setting, colour in coloured(frame.setting):
            curve = frame[frame.setting == setting]
            trace(panel, curve.ratio, curve.escaped, setting, colour, marker="o", markersize=4)
            panel.fill_between(
                curve.ratio,
                curve.lowest,
                curve.highest,
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
        limit(panel, x=1, label="exact threshold η*")
        finish(panel, "learning rate / exact threshold", "share of runs that escape", log="x")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the accuracy of the exact threshold, compared with the best other rule."""
        if "confusion" not in tables:
            return
        for name, group in tables["confusion"].groupby("setting", sort=False):
            is_exact = group.rule == "exact threshold"
            exact, others = group[is_exact].iloc[0], group[~is_exact]
            rival = others.loc[others.right.idxmax()]
            enough = bool(exact.cases >= LEAST_CASES)
            yield all_of(
                f"The exact threshold says what SGD does ({name})",
                [enough and exact.right >= RIGHT and exact.right >= rival.right + AHEAD],
                theory="it is the threshold of mean-square stability",
                ours="; ".join(
                    f"{row.rule}: {row.right:.1%} right ({row.said_escape_stayed} false alarms,"
                    f" {row.said_stay_escaped} missed)"
                    for row in group.itertuples()
                ),
                tolerance=f"right in {RIGHT:.0%}, and {AHEAD:.0%} more than the best other rule; at"
                f" least {LEAST_CASES} cases",
                why=f"{exact.cases} cases{'' if enough else ': too few to say'}"
                f"; the best other rule is {rival.rule}",
            )


EXPERIMENT = PredictionBeyond
