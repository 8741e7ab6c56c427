"""A flatter minimum that tests worse, with proof: the claim of the paper's Appendix B.

The construction is ours: f(x) = p x₁ + q² x₂, trained on inputs along (1, 1), with targets x₂. On the
curve of its global minima the sharpness is 2(1 + 4q²) and the test error 2(1 − q²)²: of any two minima
the sharper tests better (derived in ``counterexample/model.py``). GD and SGD start near the truth, which
is the sharpest minimum. At small learning rates they stay. At larger ones, or with smaller batches, it
is linearly unstable, and they leave for flatter minima that test worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.experiments.counterexample.model import Curve, Descent, Measured
from benchmarks.framework.claims import Claim, all_of, at_most, spread
from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
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
MAX_SHARPNESS = 10.0
"""Sharpness of the truth, the sharpest minimum on the curve."""


@dataclass(frozen=True)
class Counterexample(Experiment):
    """Appendix B.

    Attributes:
        lrs: learning rates of gradient descent, the smallest first.
        sgd_lr: learning rate of SGD.
        batch_sizes: batch sizes of SGD.
        n: number of training samples, even.
        contrast: the ratio s/a.
        steps: largest number of steps of a run.
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
        """The closed forms along the curve of minima."""
        return Curve(self.n, self.contrast)

    def cases(self) -> dict[str, list[Case]]:
        """Return the measurements along the curve, and the runs."""
        settings = [(lr, None) for lr in self.lrs] + [(self.sgd_lr, b) for b in self.batch_sizes]
        runs = [
            case_of(
                Descent(lr, size, seed, self.n, self.contrast, steps=self.steps),
                optimizer="GD" if size is None else "SGD",
                lr=lr,
                batch_size="all" if size is None else size,
                seed=seed,
                limit=self.curve.limit(lr, size),
            )
            for lr, size in settings
            for seed in self.seeds
        ]
        return {"curve": [case_of(Measured(self.n, self.contrast))], "runs": runs}

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return the points of the curve with their closed forms, or the end of a run."""
        if name == "runs":
            keys = ("outcome", "steps", "p", "q", "loss", "sharpness", "risk")
            yield case.keys | {key: result.get(key) for key in keys}
            return
        for point in result["points"]:
            a = self.curve.sharpness(point["q"])
            yield {
                **{"q": point["q"], "sharpness": a, "measured_sharpness": point["sharpness"]},
                "non_uniformity": self.contrast * a,
                "measured_non_uniformity": point["non_uniformity"],
                **{"risk": self.curve.risk(point["q"]), "risk_from_weights": point["risk"]},
            }

    def summary(self, tables: Tables) -> Tables:
        """Return the ends of the runs of each method."""
        if "runs" not in tables:
            return {}
        rows = []
        for name, runs in _methods(tables["runs"]):
            ended = runs[runs.outcome == "reached"]
            rows.append(
                {
                    "method": name,
                    "limit on a": runs.limit.iloc[0],
                    "minima": f"{len(ended)} of {len(runs)}",
                    "sharpness": spread(ended.sharpness) if len(ended) else None,
                    "test error": spread(ended.risk) if len(ended) else None,
                }
            )
        return {"ends": table(rows)}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure:
        """Return test error against sharpness, along the curve or at the ends of the runs."""
        figure, (axes,) = panels(width=5.5)
        a = np.linspace(2, MAX_SHARPNESS, 100)
        trace(axes, a, self.curve.risk_at(a), "closed form", BLACK, linewidth=1)
        if name == "curve":
            points(
                axes, frame.measured_sharpness, frame.risk_from_weights, "measured", markersize=4
            )
        else:
            methods = dict(_methods(frame))
            for method, colour in coloured(methods):
                runs = methods[method]
                ended = runs[runs.outcome == "reached"]
                points(axes, ended.sharpness, ended.risk, method, colour, markersize=5, alpha=0.7)
                if runs.limit.iloc[0] < MAX_SHARPNESS:
                    limit(axes, runs.limit.iloc[0], colour=colour)
            limit(axes, [], [], "largest stable a", GREY)
        finish(axes, "sharpness a", "test error")
        return figure

    def claims(self, tables: Tables) -> Iterator[Claim]:
        """Yield the anticorrelation along the curve, and the selection by stability."""
        if "curve" in tables and len(tables["curve"]) > 1:
            yield from _on_the_curve(tables["curve"])
        methods = list(_methods(tables["runs"])) if "runs" in tables else []
        ended = [(name, runs[runs.outcome == "reached"], len(runs)) for name, runs in methods]
        with_minima = [method for method in ended if len(method[1])]
        for name, runs, tried in with_minima[1:]:
            if runs.limit.iloc[0] < MAX_SHARPNESS:
                reference, stayed, _ = with_minima[0]
                yield self._selected(reference, stayed, name, runs, tried - len(runs))

    def _selected(self, reference: str, stayed: Any, name: str, ended: Any, lost: int) -> Claim:
        bound = float(ended.limit.iloc[0])
        sharpest = ended.sharpness.max()
        worse = ended.risk.min() > stayed.risk.max()
        return all_of(
            f"{name} leaves the minimum where {reference} stays, for a flatter one that tests worse",
            [sharpest <= 1.02 * bound, worse],
            theory=f"a up to {bound:.3g}, where the truth has {MAX_SHARPNESS:g}; test error above"
            f" {self.curve.risk_at(bound):.2g}",
            ours=f"a = {spread(ended.sharpness)}, at most {sharpest:.3g}; test error"
            f" {spread(ended.risk)}, against {mean(stayed.risk):.2g}",
            tolerance="2 % above the limit; every run worse than every one that stays",
            why=f"{lost} of {lost + len(ended)} runs diverged or did not settle" if lost else "",
        )


def _methods(runs: Any) -> Iterator[tuple[str, Any]]:
    for (optimizer, lr, size), group in runs.groupby(["optimizer", "lr", "batch_size"], sort=False):
        batch = "" if optimizer == "GD" else f", B = {size}"
        yield f"{optimizer}{batch}, η = {lr:g}", group


def _on_the_curve(curve: Any) -> Iterator[Claim]:
    ordered = curve.sort_values("measured_sharpness")
    a, risk = ordered.measured_sharpness, ordered.risk_from_weights
    yield all_of(
        "of two global minima the flatter one tests worse, Appendix B",
        risk.diff().dropna() < 0,
        printed="such minima exist",
        ours=f"test error falls from {risk.iloc[0]:.3g} at a = {a.iloc[0]:.3g} to"
        f" {risk.iloc[-1]:.3g} at a = {a.iloc[-1]:.3g}, at each of {len(curve)} minima in between",
        tolerance="strictly",
        why="the construction is ours",
    )
    pairs = (("sharpness", "measured_sharpness"), ("non_uniformity", "measured_non_uniformity"))
    error = max((curve[b] / curve[a] - 1).abs().max() for a, b in pairs)
    yield at_most(
        "sharpness and non-uniformity of these minima",
        [error],
        1e-6,
        theory="2(1 + 4q²) and s/a constant, in closed form",
        ours=f"measured to {error:.0e}",
        tolerance="1e-6",
    )


EXPERIMENT = Counterexample
