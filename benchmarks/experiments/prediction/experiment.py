"""Which rule predicts what SGD will do? Every rule against every outcome. Beyond the paper.

From each of several minima SGD runs at each batch size and learning rate of a grid that is chosen
without regard to the rules. Before a run each rule says "stay" or "escape"; the run has escaped if
the training loss rises tenfold. The rules are condition (8), which is sufficient for stability; the
box (9); the exact mean-square threshold; 2/η alone; and, for comparison with not measuring at all,
the best threshold on η/B, which is chosen with hindsight, in its favour. All of them take batches for
independent; where these are reshuffled each epoch, the threshold of the epoch's own second-moment
operator is one more rule.
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
"""So that the shares in the confusion matrices mean something."""


@dataclass(frozen=True)
class Prediction(Experiment):
    """Confusion matrices.

    Attributes:
        lrs: of the gradient descents that find the minima.
        n: training images: few, since the exact threshold takes time as (nC)^3.
        target_loss: at which gradient descent stops.
        batch_sizes: of SGD.
        fractions: learning rates of SGD, as fractions of the minimum's 2/a.
        steps: of SGD, within which it must leave to count as escaped.
        samplings: how batches are drawn: ``"independent"``, as in the theory, or ``"reshuffled"``.
    """

    name = "prediction"
    shows = "Beyond the paper"
    columns: ClassVar = {"cases": (), "growths": ()}
    presets: ClassVar = {
        ("smoke", ""): {
            "n": 16,
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
        places = [
            (Thresholds(start, self.batch_sizes), fraction, size)
            for start in starts
            for size in self.batch_sizes
            for fraction in self.fractions
        ]
        found = {
            "cases": [
                Case(
                    Trial(*place, steps=self.steps, independent=sampling == "independent"),
                    {"sampling": sampling, **_keys(*place)},
                )
                for sampling in self.samplings
                for place in places
            ]
        }
        if "reshuffled" in self.samplings:
            found["growths"] = [
                Case(EpochGrowth(*place), {**_keys(*place), "fraction": place[1]})
                for place in places
            ]
        return found

    def rows(self, name: str, one: Case, found: Outcome | Grown, store: Store) -> Iterable[Row]:
        """Return what each rule said, and what SGD did; or how fast the second moment grows."""
        if isinstance(found, Grown):
            yield {**one.keys, **asdict(found)}
            return
        trial = one.job
        said = dict(found.said)
        growth = EpochGrowth(trial.thresholds, trial.fraction, trial.batch_size)
        if not trial.independent and store.done(growth):
            per_epoch = store.result(growth).per_epoch
            said["threshold of the epoch"] = per_epoch is None or per_epoch > 0
        yield {**one.keys, **as_row(replace(found, said=said))}

    def derived(self, tables: Tables) -> Tables:
        """Return ``confusion``: a row for each sampling and rule."""
        if "cases" not in tables:
            return {}
        by_sampling = tables["cases"].groupby("sampling", sort=False)
        rows = (row for sampling, its in by_sampling for row in confusion(its, str(sampling)))
        return {"confusion": table(rows)}

    def draw(self, name: str, its: pd.DataFrame) -> Figure | None:
        """Return, for the cases, η/η* against batch size, marked by what SGD did."""
        if name != "cases":
            return None
        figure, axes = panels(len(self.samplings), sharey=True)
        for number, (panel, sampling) in enumerate(zip(axes, self.samplings, strict=True)):
            for label, colour, marker in (("stayed", BLUE, "o"), ("escaped", VERMILION, "x")):
                escaped = label == "escaped"
                known: Any = its[(its.sampling == sampling) & (its.escaped_at.notna() == escaped)]
                # A little sideways, so that marks do not hide each other.
                x = known.batch_size * (1 + 0.03 * (known.seed - 0.5) + 0.05 * escaped)
                style = {"marker": marker, "markersize": 5, "fillstyle": "none"}
                points(panel, x, known.lr / known.critical_lr, label, colour, **style)
            limit(panel, y=1, label="exact threshold η*")
            y, title = "learning rate / exact threshold", f"{sampling} batches"
            finish(
                panel,
                "batch size B",
                "" if number else y,
                log="xy",
                title=title,
                legend=not number,
                ticks=self.batch_sizes,
            )
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return how often each rule was right, the exact threshold against the others."""
        if "confusion" not in tables:
            return
        for sampling, its in tables["confusion"].groupby("sampling", sort=False):
            rules = set(its.rule)
            own = "threshold of the epoch"
            judged = own if sampling == "reshuffled" and own in rules else "exact threshold"
            best, others = its[its.rule == judged].iloc[0], its[its.rule != judged]
            enough = best.cases >= LEAST_CASES
            level = others[others.right >= best.right].rule
            yield all_of(
                f"The {judged} says what SGD does ({sampling} batches)",
                [enough and not len(level)],
                theory="right more often than every other rule",
                ours="; ".join(
                    f"{row.rule}: {row.right:.1%} right ({row.said_escape_stayed} false alarms,"
                    f" {row.said_stay_escaped} missed)"
                    for row in its.itertuples()
                ),
                tolerance=f"none; at least {LEAST_CASES} cases",
                why=f"{best.cases} cases{'' if enough else ': too few to say'}"
                + "".join(f"; {rule} is right as often, or more" for rule in level),
            )


def as_row(found: Outcome) -> dict[str, Any]:
    """Return a trial's numbers, a column for each rule, and what SGD did."""
    result = asdict(found)
    said = result.pop("said")
    ends = {key: result.pop(key) for key in ("escaped_at", "largest_loss_ratio")}
    return {**result, **{RULES[rule]: said.get(rule) for rule in RULES if rule in said}, **ends}


def _keys(thresholds: Thresholds, fraction: float, batch_size: int) -> dict[str, Any]:
    start = thresholds.start
    return {"minimum_lr": start.lr, "seed": start.seed, "batch_size": batch_size}


EXPERIMENT = Prediction
