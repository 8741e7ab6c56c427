"""Quasi-Newton methods settle in sharper minima: Figure 9 of the paper, and other preconditioners.

L-BFGS trains to a minimum, from which gradient descent and SGD continue, all with tuned learning rates.
If the minimum is sharper than 2/η, they leave it for a flatter one. Beyond the paper, Adam, Adahessian,
Apollo and Shampoo train from scratch. Their limit is on the *preconditioned* sharpness, and does not
bound the sharpness itself. One half of the test images chooses the learning rates, and accuracies are
reported on the other. Some of the labels are random, so that there is accuracy to gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd

from benchmarks.experiments.quasi_newton.jobs import METHODS, Budget, Search, Training
from benchmarks.framework.claims import Claim, all_of, clearly_positive, span, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
from benchmarks.framework.plotting import coloured, finish, limit, panels, points
from benchmarks.training.data import Dataset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "QuasiNewton"]

LBFGS = "L-BFGS"


_ESCAPED = 0.9
"""Share of the sharpness below which a run has left its minimum: GD ends at 0.98 or more of it where it
stays."""


@dataclass(frozen=True)
class QuasiNewton(Experiment):
    """Figure 9.

    Attributes:
        n: number of training images.
        random_labels: how many of them get a random label.
        target_loss: training loss at which a run stops.
        max_steps: largest number of steps.
        min_steps: fewest steps of GD and SGD from the minimum, so that they have time to leave.
        batch_size: batch size of SGD.
        lbfgs_lrs: learning rates tried with the first seed; likewise for the other methods.
    """

    name = "quasi-newton"
    shows = "Figure 9"
    presets: ClassVar = {
        ("smoke", ""): {
            **{"n": 100, "random_labels": 15, "max_steps": 20, "min_steps": 10},
            **{"target_loss": 0.02, "lbfgs_lrs": (0.3,), "gd_lrs": (0.5,), "sgd_lrs": (0.3,)},
            **{"adam_lrs": (3e-3,), "adahessian_lrs": (0.15,), "apollo_lrs": (0.3,)},
            "shampoo_lrs": (0.1,),
        },
        ("small", "digits"): {
            **{"seeds": (0, 1, 2), "max_steps": 1000, "min_steps": 300},
            **{"lbfgs_lrs": (0.3, 1.0), "gd_lrs": (1.0, 2.0), "sgd_lrs": (0.3, 1.0)},
            **{"adam_lrs": (3e-3,), "adahessian_lrs": (0.15,), "apollo_lrs": (0.3,)},
            "shampoo_lrs": (0.1,),
        },
        ("small", "fashion-mnist"): {"max_steps": 1000, "target_loss": 3e-3},
        ("paper", ""): {"seeds": (0, 1, 2, 3, 4)},
    }

    n: int = 1000
    random_labels: int = 150
    target_loss: float = 1e-3
    max_steps: int = 2000
    min_steps: int = 500
    batch_size: int = 16
    lbfgs_lrs: tuple[float, ...] = (0.1, 0.3, 1.0)
    gd_lrs: tuple[float, ...] = (0.3, 1.0, 2.0)
    sgd_lrs: tuple[float, ...] = (0.1, 0.3, 1.0)
    adam_lrs: tuple[float, ...] = (1e-3, 3e-3)
    adahessian_lrs: tuple[float, ...] = (0.05, 0.15)
    apollo_lrs: tuple[float, ...] = (0.1, 0.3)
    shampoo_lrs: tuple[float, ...] = (0.03, 0.1, 0.3)

    @property
    def lrs(self) -> dict[str, tuple[float, ...]]:
        """The learning rates that are tried, by method."""
        return {
            LBFGS: self.lbfgs_lrs,
            "L-BFGS, then GD": self.gd_lrs,
            "L-BFGS, then SGD": self.sgd_lrs,
            "GD": self.gd_lrs,
            "Adam": self.adam_lrs,
            "Adahessian": self.adahessian_lrs,
            "Apollo": self.apollo_lrs,
            "Shampoo": self.shampoo_lrs,
        }

    def _plan(self) -> dict[str, tuple[Search, list[Training]]]:
        """Return each method's search, and its runs at the chosen learning rate, one per seed."""
        data = Dataset(self.data, self.n, self.random_labels)
        budget = Budget(self.target_loss, self.max_steps, self.min_steps, self.batch_size)
        plan: dict[str, tuple[Search, list[Training]]] = {}
        for name, method in METHODS.items():
            starts: list[Training | None] = [None] * len(self.seeds)
            if method.from_minimum:
                starts = [*plan[LBFGS][1]]
            first = self.seeds[0]
            search = Search(
                tuple(
                    Training(data, name, first, budget, lr=lr, start=starts[0])
                    for lr in self.lrs[name]
                )
            )
            runs = [
                Training(data, name, seed, budget, search=search, start=start)
                for seed, start in zip(self.seeds, starts, strict=True)
            ]
            plan[name] = (search, runs)
        return plan

    def cases(self) -> dict[str, list[Case]]:
        """Return the trials of the searches, and a run for each method and seed."""
        plan = self._plan().values()
        tables = {
            "searched": [job for search, _ in plan for job in search.trials],
            "solutions": [job for _, runs in plan for job in runs],
        }
        return {
            name: [case_of(job, "method", "seed") for job in jobs] for name, jobs in tables.items()
        }

    def summary(self, tables: Tables) -> Tables:
        """Return the measurements at the end of each method, averaged over seeds."""
        if "solutions" not in tables:
            return {}
        keys = ["lr", "loss", "sharpness", "sharpness_limit"]
        keys += ["preconditioned_sharpness", "preconditioned_sharpness_limit", "test"]
        means = tables["solutions"].groupby("method", sort=False)[keys].mean().reset_index()
        return {"where-they-settle": means}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return accuracy, and preconditioned sharpness over its limit, against sharpness."""
        if name != "solutions":
            return None
        figure, (escape, edge) = panels(2, title="Where they settle")
        for method, colour in coloured(frame.method):
            runs = frame[frame.method == method].dropna(subset="sharpness")
            points(escape, runs.sharpness, 100 * runs.test, str(method), colour)
            shares = runs.preconditioned_sharpness / runs.preconditioned_sharpness_limit
            points(edge, runs.sharpness, shares, "", colour)
        limit(edge, y=1.0)
        finish(escape, "sharpness a", "test accuracy, %", log="x")
        title = "what the optimizer's own limit is on"
        finish(edge, "sharpness a", "preconditioned sharpness / its limit", log="x", title=title)
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield whether GD and SGD find flatter, better minima, and whether all keep their limits."""
        if "solutions" not in tables:
            return
        methods = dict(iter(tables["solutions"].groupby("method", sort=False)))
        if LBFGS in methods:
            for name, method in METHODS.items():
                if method.from_minimum and name in methods:
                    yield from _escapes(name, methods[name], methods[LBFGS])
        for name, runs in methods.items():
            yield from _at_its_limit(name, runs)


def _spread(values: pd.Series, form: str = ".3g") -> str | None:
    values = values.dropna()
    return spread(values, form) if len(values) else None


def _escapes(name: str, runs: pd.DataFrame, before: pd.DataFrame) -> Iterator[Claim]:
    pairs = runs.merge(before, on="seed", suffixes=("", "_before"))
    pairs = pairs.dropna(subset=["sharpness", "sharpness_before"])
    if not len(pairs):
        return
    lost = len(runs) - len(pairs)
    diverged = f"{lost} of {len(runs)} diverged" if lost else ""
    kept = pairs.sharpness / pairs.sharpness_before
    unstable = pairs.sharpness_before > 2 / pairs.lr
    starts = f"{unstable.sum()} of {len(pairs)} start above 2/η"
    if 0 < unstable.sum() < len(pairs):
        starts += f", and end at {span(kept[unstable])} of the start; the others at"
        starts += f" {span(kept[~unstable])}"
    yield all_of(
        f"{name}: escapes to a flatter minimum, Figure 9",
        [*(kept < _ESCAPED), *[False] * lost],
        printed="flatter",
        ours=f"a from {_spread(pairs.sharpness_before)} to {_spread(pairs.sharpness)};"
        f" η = {pairs.lr.iloc[0]:g}",
        tolerance=f"every seed, to below {_ESCAPED:g} of the start",
        why="; ".join(filter(None, [starts, diverged])),
    )
    gains = 100 * (pairs.test - pairs.test_before)
    yield all_of(
        f"{name}: and to one that tests better, Figure 9",
        [clearly_positive(gains)],
        printed="better than L-BFGS's best, 69.5 % there (Fashion-MNIST)",
        ours=f"from {_spread(pairs.test_before, '.2%')} to {_spread(pairs.test, '.2%')}",
        tolerance="the mean gain is two standard errors above 0",
        why="; ".join(filter(None, [f"the gain is {spread(gains, '.2g')} points", diverged])),
    )


def _at_its_limit(name: str, runs: pd.DataFrame) -> Iterator[Claim]:
    ratios = (runs.preconditioned_sharpness / runs.preconditioned_sharpness_limit).dropna()
    lost = int(runs.sharpness.isna().sum())
    if not len(ratios) and not (METHODS[name].preconditioned and lost):
        return
    remarks = []
    if (ratios > 1.1).any():
        remarks.append(
            "the preconditioner changes from step to step, and a limit that is exceeded for some steps"
            " need not end in divergence"
        )
    if lost:
        remarks.append(f"{lost} of {len(runs)} diverged")
    yield all_of(
        f"{name} ends within its own limit, which is on preconditioned sharpness",
        [*(ratios <= 1.1), *[False] * lost],
        printed="at most 1, section 5" if name == LBFGS else "",
        theory="" if name == LBFGS else "at most 1 (beyond the paper)",
        ours=f"{spread(ratios)} of it, at a sharpness of {_spread(runs.sharpness)}"
        if len(ratios)
        else "no minimum",
        tolerance="10 %, every seed",
        why="; ".join(remarks),
    )


EXPERIMENT = QuasiNewton
