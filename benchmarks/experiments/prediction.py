"""Which rule predicts what SGD will do? Every rule against every outcome. Beyond the paper.

From each of several minima SGD runs at each batch size and learning rate of a grid that is chosen
without regard to the rules. Before a run each rule says "stay" or "escape"; the run has escaped if
the training loss rises tenfold. The rules are condition (8), which is sufficient for stability; the
box (9); the exact mean-square threshold; 2/η alone; and, for comparison with not measuring at all,
the best threshold on η/B, which is chosen with hindsight, in its favour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from benchmarks.framework.claims import Claim, all_of
from benchmarks.framework.experiment import Case, Experiment, Tables
from benchmarks.framework.plotting import BLUE, VERMILION, finish, limit, panels, points
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Job, Store, Work
from benchmarks.training.data import Dataset
from benchmarks.training.escape import Switch, box
from benchmarks.training.minimum import Solution, from_minimum
from benchmarks.training.threshold import Thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "RULES", "Prediction", "confusion"]

RULES = {
    "sharpness alone": "sharpness_alone",
    "box (9)": "box",
    "condition (8)": "condition_8",
    "exact threshold": "exact",
    "η/B alone": "",
}
"""The rules, and the columns in which they say whether SGD escapes; η/B is judged afterwards."""

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
    columns: ClassVar = {"cases": ()}
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
        return {
            "cases": [
                Case(
                    Trial(
                        Thresholds(start, self.batch_sizes),
                        fraction=fraction,
                        batch_size=size,
                        steps=self.steps,
                        independent=sampling == "independent",
                    ),
                    {"sampling": sampling, "minimum_lr": start.lr, "seed": start.seed}
                    | {"batch_size": size},
                )
                for start in starts
                for sampling in self.samplings
                for size in self.batch_sizes
                for fraction in self.fractions
            ]
        }

    def rows(self, name: str, one: Case, found: Outcome, store: Store) -> Iterable[Row]:
        """Return what each rule said, and what SGD did."""
        result = asdict(found)
        said = result.pop("said")
        ends = {key: result.pop(key) for key in ("escaped_at", "largest_loss_ratio")}
        yield {**one.keys, **result, **{RULES[rule]: said[rule] for rule in said}, **ends}

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
            is_exact = its.rule == "exact threshold"
            best, others = its[is_exact].iloc[0], its[~is_exact]
            enough = best.cases >= LEAST_CASES
            level = others[others.right >= best.right].rule
            yield all_of(
                f"The exact threshold says what SGD does ({sampling} batches)",
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


@dataclass(frozen=True)
class Outcome:
    """What the rules said of a trial, and what SGD did.

    Attributes:
        lr: learning rate of SGD.
        full_batch: 2/a.
        theorem1: the largest learning rate that condition (8) allows.
        critical_lr: the exact threshold.
        said: by rule, whether SGD will escape.
        escaped_at: the first step looked at by which it had, or ``None``.
        largest_loss_ratio: the largest training loss over the first; ``None`` if not finite.
    """

    lr: float
    full_batch: float
    theorem1: float
    critical_lr: float
    said: dict[str, bool]
    escaped_at: int | None
    largest_loss_ratio: float | None


@dataclass(frozen=True)
class Trial(Job):
    """SGD from a minimum at a fraction of its 2/a: a :class:`Switch` whose rate the minimum sets.

    The first line of the trace is what each rule says, before a step is taken. The result is an
    :class:`Outcome`.
    """

    kind = "trial"
    Result: ClassVar = Outcome

    thresholds: Thresholds
    fraction: float
    batch_size: int
    steps: int
    independent: bool

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum and its thresholds."""
        return (self.thresholds.start, self.thresholds)

    def run(self, work: Work) -> dict[str, Any]:
        """Predict by every rule, then run SGD."""
        start = self.thresholds.start
        begun = from_minimum(start, work)
        allowed = work.result(self.thresholds)
        mine = allowed.at(self.batch_size)
        lr = self.fraction * allowed.full_batch
        a, s = begun.found.sharpness, begun.found.non_uniformity
        in_box = box(a, s, lr=lr, batch_size=self.batch_size, n=start.data.n)
        said = {
            "sharpness alone": lr > allowed.full_batch,
            "box (9)": in_box.escapes,
            "condition (8)": lr > mine.theorem1,
            "exact threshold": lr > mine.critical_lr,
        }
        work.restored()
        work.trace(lr=lr, said=said)
        switch = Switch(
            start,
            lr=lr,
            batch_size=self.batch_size,
            steps=self.steps,
            independent=self.independent,
            measure_after=False,
        )
        done = switch.go(begun, work)
        return {
            **{"lr": lr, "said": said, "full_batch": allowed.full_batch},
            **{"theorem1": mine.theorem1, "critical_lr": mine.critical_lr},
            **{"escaped_at": done.escaped_at, "largest_loss_ratio": done.largest_loss_ratio},
        }


def confusion(cases: pd.DataFrame, sampling: str = "") -> Iterator[dict[str, Any]]:
    """Yield a row for each rule: how often it said what, and what SGD did.

    The threshold on η/B is the one that is right most often on these very cases.

    >>> cases = table(
    ...     {"lr": lr, "batch_size": 1, "sharpness_alone": False, "box": lr > 2, "condition_8": True,
    ...      "exact": lr > 1, "escaped_at": 10 if lr > 1 else None}
    ...     for lr in (0.5, 1.5, 2.5)
    ... )
    >>> [round(row["right"], 2) for row in confusion(cases)]
    [0.33, 0.67, 0.67, 1.0, 1.0]
    """
    escaped = cases.escaped_at.notna().to_numpy()
    noise = cases.lr.to_numpy() / cases.batch_size.to_numpy()
    best = max([0.0, *np.unique(noise)], key=lambda bound: ((noise > bound) == escaped).sum())
    for rule, column in RULES.items():
        says = cases[column].to_numpy(bool) if column else noise > best
        yield {
            "sampling": sampling,
            "rule": rule,
            "cases": len(cases),
            "said_escape_escaped": int((says & escaped).sum()),
            "said_escape_stayed": int((says & ~escaped).sum()),
            "said_stay_escaped": int((~says & escaped).sum()),
            "said_stay_stayed": int((~says & ~escaped).sum()),
            "right": float((says == escaped).mean()),
        }


EXPERIMENT = Prediction
