"""Which rule predicts what SGD will do? Every rule against every outcome. Beyond the paper.

From each of several minima SGD runs at every batch size and learning rate of a grid, which is chosen
independently of the rules. Before a run each rule predicts "stay" or "escape"; a run has escaped if the
training loss rises tenfold. The rules are condition (8), which is sufficient for stability; the box (9);
the exact mean-square threshold; 2/η alone; and, as a baseline without measurements, the best threshold
on η/B, fitted in hindsight. All of them assume independent batches. Where batches are reshuffled each
epoch, a further rule is the threshold of the second-moment operator of a whole epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from benchmarks.experiments.prediction.rules import RULES, confusion
from benchmarks.experiments.prediction.trial import EpochGrowth, Grown, Outcome, Trial
from benchmarks.framework.claims import Claim, all_of
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import BLUE, VERMILION, finish, limit, panels, points
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution
from benchmarks.training.threshold import Thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Prediction", "as_row"]

LEAST_CASES = 200
"""Fewest cases for which the confusion matrices are conclusive."""


@dataclass(frozen=True)
class Prediction(Experiment):
    """Confusion matrices of the rules.

    Attributes:
        lrs: learning rates of the gradient descents that find the minima.
        n: training images: few, since the cost of the exact threshold grows as (nC)^3.
        target_loss: training loss at which gradient descent stops.
        batch_sizes: batch sizes of SGD.
        fractions: learning rates of SGD, relative to the minimum's 2/a.
        steps: number of SGD steps within which a run must escape.
        samplings: how batches are drawn: ``"independent"``, as in the theory, or ``"reshuffled"``.
    """

    name = "prediction"
    shows = "Beyond the paper"
    columns: ClassVar = {"cases": (), "growths": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 8,
            "lrs": (1.0,),
            "target_loss": 3e-3,
            "batch_sizes": (1, 4),
            "fractions": (0.1, 0.5, 1.2),
            "steps": 100,
        },
        ("small", ""): {"seeds": (0, 1)},
        ("paper", ""): {
            "seeds": (0, 1, 2, 3, 4),
            "n": 120,
            "steps": 4000,
            "target_loss": 1e-6,
            "fractions": (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
        },
    }

    lrs: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    n: int = 64
    target_loss: float = 1e-5
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    fractions: tuple[float, ...] = (0.1, 0.16, 0.26, 0.42, 0.68, 1.1)
    steps: int = 1000
    samplings: tuple[str, ...] = ("independent", "reshuffled")

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an unknown sampling."""
        super().__post_init__()
        for sampling in self.samplings:
            if sampling not in ("independent", "reshuffled"):
                raise ValueError(f"samplings: {sampling!r}, expected independent or reshuffled")

    def cases(self) -> dict[str, list[Case]]:
        """Return a trial for each minimum, sampling, batch size and fraction."""
        data = Dataset(self.data, self.n)
        starts = [
            Solution(data, lr=lr, seed=seed, target_loss=self.target_loss)
            for lr in self.lrs
            for seed in self.seeds
        ]
        grid = [
            (Thresholds(start, self.batch_sizes), fraction, size)
            for start in starts
            for size in self.batch_sizes
            for fraction in self.fractions
        ]
        tables = {
            "cases": [
                Case(
                    Trial(*point, steps=self.steps, independent=sampling == "independent"),
                    {"sampling": sampling, **_keys(*point)},
                )
                for sampling in self.samplings
                for point in grid
            ]
        }
        if "reshuffled" in self.samplings:
            tables["growths"] = [
                Case(EpochGrowth(*point), {**_keys(*point), "fraction": point[1]}) for point in grid
            ]
        return tables

    def rows(self, name: str, case: Case, result: Outcome | Grown, store: Store) -> Iterable[Row]:
        """Return the rules' predictions and the run's outcome; or the growth of the second moment."""
        if isinstance(result, Grown):
            yield {**case.keys, **asdict(result)}
            return
        trial = case.job
        said = dict(result.said)
        growth = EpochGrowth(trial.thresholds, trial.fraction, trial.batch_size)
        if not trial.independent and store.done(growth):
            per_epoch = store.result(growth).per_epoch
            said["threshold of the epoch"] = per_epoch is None or per_epoch > 0
        yield {**case.keys, **as_row(replace(result, said=said))}

    def derived(self, tables: Tables) -> Tables:
        """Return the table ``confusion``, with a row for each sampling and rule."""
        if "cases" not in tables:
            return {}
        by_sampling = tables["cases"].groupby("sampling", sort=False)
        rows = (row for sampling, group in by_sampling for row in confusion(group, str(sampling)))
        return {"confusion": table(rows)}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return η/η* of the runs against batch size, marked by outcome."""
        if name != "cases":
            return None
        figure, axes = panels(len(self.samplings), sharey=True)
        for index, (panel, sampling) in enumerate(zip(axes, self.samplings, strict=True)):
            for label, colour, marker in (("stayed", BLUE, "o"), ("escaped", VERMILION, "x")):
                escaped = label == "escaped"
                runs: Any = frame[
                    (frame.sampling == sampling) & (frame.escaped_at.notna() == escaped)
                ]
                # A small horizontal offset, so that marks do not overlap.
                x = runs.batch_size * (1 + 0.03 * (runs.seed - 0.5) + 0.05 * escaped)
                style = {"marker": marker, "markersize": 5, "fillstyle": "none"}
                points(panel, x, runs.lr / runs.critical_lr, label, colour, **style)
            limit(panel, y=1, label="exact threshold η*")
            y, title = "learning rate / exact threshold", f"{sampling} batches"
            finish(
                panel,
                "batch size B",
                "" if index else y,
                log="xy",
                title=title,
                legend=not index,
                ticks=self.batch_sizes,
            )
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the accuracy of the rules, and whether the exact threshold's is the highest."""
        if "confusion" not in tables:
            return
        for sampling, group in tables["confusion"].groupby("sampling", sort=False):
            rules = set(group.rule)
            epoch_rule = "threshold of the epoch"
            judged = "exact threshold"
            if sampling == "reshuffled" and epoch_rule in rules:
                judged = epoch_rule
            best, others = group[group.rule == judged].iloc[0], group[group.rule != judged]
            enough = best.cases >= LEAST_CASES
            not_beaten = others[others.right >= best.right].rule
            yield all_of(
                f"The {judged} says what SGD does ({sampling} batches)",
                [enough and not len(not_beaten)],
                theory="right more often than every other rule",
                ours="; ".join(
                    f"{row.rule}: {row.right:.1%} right ({row.said_escape_stayed} false alarms,"
                    f" {row.said_stay_escaped} missed)"
                    for row in group.itertuples()
                ),
                tolerance=f"none; at least {LEAST_CASES} cases",
                why=f"{best.cases} cases{'' if enough else ': too few to say'}"
                + "".join(f"; {rule} is right as often, or more" for rule in not_beaten),
            )


def as_row(outcome: Outcome) -> dict[str, Any]:
    """Return a trial's numbers, each rule's prediction, and the outcome of the run."""
    result = asdict(outcome)
    said = result.pop("said")
    ends = {key: result.pop(key) for key in ("escaped_at", "largest_loss_ratio")}
    return {**result, **{RULES[rule]: said.get(rule) for rule in RULES if rule in said}, **ends}


def _keys(thresholds: Thresholds, fraction: float, batch_size: int) -> dict[str, Any]:
    start = thresholds.start
    return {"minimum_lr": start.lr, "seed": start.seed, "batch_size": batch_size}


EXPERIMENT = Prediction
