"""A flatter minimum that tests worse, with proof: the claim of the paper's Appendix B.

The construction is ours: f(x) = p x₁ + q² x₂, trained on inputs along (1, 1) where the truth is x₂. On
the curve of its global minima the sharpness is 2(1 + 4q²) and the test error 2(1 − q²)²: the sharper of
any two tests better (the algebra is in ``counterexample/model.py``). GD and SGD start near the truth,
which is the sharpest. At small rates they stay; at larger ones, or with smaller batches, linear
stability makes them leave, for flatter minima that test worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.experiments.counterexample.model import Curve, Descent, Measured
from benchmarks.framework.claims import Claim, all_of, at_most, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case
from benchmarks.framework.plotting import (
    BLACK,
    GREY,
    coloured,
    finish,
    limit,
    panels,
    points,
    trace,
)
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Counterexample"]

SEEDS = tuple(range(10))
MOST = 10.0
"""Sharpness of the truth, the largest on the curve."""


@dataclass(frozen=True)
class Counterexample(Experiment):
    """Appendix B.

    Attributes:
        lrs: of gradient descent, the smallest first.
        sgd_lr: of SGD.
        batch_sizes: of SGD.
        n: training samples, an even number.
        contrast: s/a.
        steps: of each run at most.
    """

    name = "counterexample"
    shows = "Appendix B"
    datasets = ("two-coordinates",)
    columns: ClassVar = {"curve": (), "runs": ()}
    presets: ClassVar = {
        ("smoke", ""): {"seeds": (0, 1), "lrs": (0.15, 0.25), "batch_sizes": (1,)},
        ("small", ""): {"seeds": SEEDS},
        ("paper", ""): {"seeds": tuple(range(50))},
    }

    data: str = "two-coordinates"
    lrs: tuple[float, ...] = (0.15, 0.25, 0.3)
    sgd_lr: float = 0.15
    batch_sizes: tuple[int, ...] = (1, 5)
    n: int = 10
    contrast: float = 0.9
    steps: int = 5000

    @property
    def curve(self) -> Curve:
        """The closed forms."""
        return Curve(self.n, self.contrast)

    def cases(self) -> dict[str, list[Case]]:
        """Return the measurements along the curve, and the runs."""
        ways = [(lr, None) for lr in self.lrs] + [(self.sgd_lr, b) for b in self.batch_sizes]
        runs = [
            case(
                Descent(lr, size, seed, self.n, self.contrast, steps=self.steps),
                optimizer="GD" if size is None else "SGD",
                lr=lr,
                batch_size="all" if size is None else size,
                seed=seed,
                limit=self.curve.limit(lr, size),
            )
            for lr, size in ways
            for seed in self.seeds
        ]
        return {"curve": [case(Measured(self.n, self.contrast))], "runs": runs}

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return each point of the curve with its closed forms, or where a run ended."""
        if name == "runs":
            keys = ("outcome", "steps", "p", "q", "loss", "sharpness", "risk")
            yield one.keys | {key: found.get(key) for key in keys}
            return
        for at in found["points"]:
            a = self.curve.sharpness(at["q"])
            yield {
                **{"q": at["q"], "sharpness": a, "measured_sharpness": at["sharpness"]},
                "non_uniformity": self.contrast * a,
                "measured_non_uniformity": at["non_uniformity"],
                **{"risk": self.curve.risk(at["q"]), "risk_from_weights": at["risk"]},
            }

    def summary(self, tables: Tables) -> Tables:
        """Return where each way of training ends."""
        if "runs" not in tables:
            return {}
        rows = []
        for name, its in _methods(tables["runs"]):
            ended = its[its.outcome == "reached"]
            rows.append(
                {
                    "method": name,
                    "limit on a": its.limit.iloc[0],
                    "minima": f"{len(ended)} of {len(its)}",
                    "sharpness": spread(ended.sharpness) if len(ended) else None,
                    "test error": spread(ended.risk) if len(ended) else None,
                }
            )
        return {"ends": table(rows)}

    def draw(self, name: str, its: pd.DataFrame) -> Figure:
        """Return test error by sharpness: the curve as measured, or where the runs end."""
        figure, (axes,) = panels(width=5.5)
        a = np.linspace(2, MOST, 100)
        trace(axes, a, self.curve.risk_at(a), "closed form", BLACK, linewidth=1)
        if name == "curve":
            points(axes, its.measured_sharpness, its.risk_from_weights, "measured", markersize=4)
        else:
            methods = dict(_methods(its))
            for method, colour in coloured(methods):
                each = methods[method]
                ended = each[each.outcome == "reached"]
                points(axes, ended.sharpness, ended.risk, method, colour, markersize=5, alpha=0.7)
                if each.limit.iloc[0] < MOST:
                    limit(axes, each.limit.iloc[0], colour=colour)
            limit(axes, [], [], "largest stable a", GREY)
        finish(axes, "sharpness a", "test error")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Return the anticorrelation, and what stability selects."""
        if "curve" in tables and len(tables["curve"]) > 1:
            yield from _on_the_curve(tables["curve"])
        ways = [] if "runs" not in tables else list(_methods(tables["runs"]))
        ended = [(name, its[its.outcome == "reached"], len(its)) for name, its in ways]
        known = [each for each in ended if len(each[1])]
        for name, its, tried in known[1:]:
            if its.limit.iloc[0] < MOST:
                calm, stayed, _ = known[0]
                yield self._selected(calm, stayed, name, its, tried - len(its))

    def _selected(self, calm: str, stayed: Any, name: str, ended: Any, lost: int) -> Claim:
        bound = float(ended.limit.iloc[0])
        sharpest = ended.sharpness.max()
        worse = ended.risk.min() > stayed.risk.max()
        return all_of(
            f"{name} leaves the minimum where {calm} stays, for a flatter one that tests worse",
            [sharpest <= 1.02 * bound, worse],
            theory=f"a up to {bound:.3g}, where the truth has {MOST:g}; test error above"
            f" {self.curve.risk_at(bound):.2g}",
            ours=f"a = {spread(ended.sharpness)}, at most {sharpest:.3g}; test error"
            f" {spread(ended.risk)}, against {mean(stayed.risk):.2g}",
            tolerance="2 % above the limit; every run worse than every one that stays",
            why=f"{lost} of {lost + len(ended)} runs diverged or did not settle" if lost else "",
        )


def _methods(its: Any) -> Iterator[tuple[str, Any]]:
    for (optimizer, lr, size), each in its.groupby(["optimizer", "lr", "batch_size"], sort=False):
        batch = "" if optimizer == "GD" else f", B = {size}"
        yield f"{optimizer}{batch}, η = {lr:g}", each


def _on_the_curve(its: Any) -> Iterator[Claim]:
    ordered = its.sort_values("measured_sharpness")
    a, risk = ordered.measured_sharpness, ordered.risk_from_weights
    yield all_of(
        "of two global minima the flatter one tests worse, Appendix B",
        risk.diff().dropna() < 0,
        printed="such minima exist",
        ours=f"test error falls from {risk.iloc[0]:.3g} at a = {a.iloc[0]:.3g} to"
        f" {risk.iloc[-1]:.3g} at a = {a.iloc[-1]:.3g}, at each of {len(its)} minima in between",
        tolerance="strictly",
        why="the construction is ours",
    )
    pairs = (("sharpness", "measured_sharpness"), ("non_uniformity", "measured_non_uniformity"))
    off = max((its[b] / its[a] - 1).abs().max() for a, b in pairs)
    yield at_most(
        "sharpness and non-uniformity of these minima",
        [off],
        1e-6,
        theory="2(1 + 4q²) and s/a constant, in closed form",
        ours=f"measured to {off:.0e}",
        tolerance="1e-6",
    )


EXPERIMENT = Counterexample
