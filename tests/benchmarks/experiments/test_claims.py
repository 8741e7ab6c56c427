"""The claims of every experiment: hand-made tables that must be reproduced, and that must not.

An entry of ``CASES`` is an experiment, tables that uphold its claims, and for claims by a part of
their text the change of a table that must refute them. A test also recomputes the claims of every
published result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import benchmarks
from benchmarks.experiments import NAMES, experiment
from benchmarks.experiments.after_lbfgs.experiment import AfterLBFGS
from benchmarks.experiments.batch_size import BatchSize
from benchmarks.experiments.control_laws.experiment import ControlLaws
from benchmarks.experiments.control_laws.jobs import LAWS
from benchmarks.experiments.correlation import Correlation
from benchmarks.experiments.counterexample.experiment import Counterexample
from benchmarks.experiments.diagram.experiment import Diagram
from benchmarks.experiments.edge import Edge
from benchmarks.experiments.escape.experiment import Escape
from benchmarks.experiments.gd_sharpness import GDSharpness
from benchmarks.experiments.loss_shape.experiment import LossShape
from benchmarks.experiments.prediction.experiment import Prediction
from benchmarks.experiments.prediction_beyond import PredictionBeyond
from benchmarks.experiments.quasi_newton.experiment import QuasiNewton
from benchmarks.experiments.selection import Selection
from benchmarks.experiments.settling import Settling
from benchmarks.experiments.steering.experiment import Steering
from benchmarks.experiments.steering.methods import REGIONS
from benchmarks.experiments.toy.experiment import Toy
from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import Experiment
from benchmarks.framework.tables import read_table, table

RESULTS = Path(benchmarks.__file__).parent / "results"

Rows = list[dict[str, Any]]
Change = Callable[[dict[str, Rows]], object]


@dataclass(frozen=True)
class Case:
    """Attributes:
    one: the experiment.
    tables: that uphold all its claims, rows by name.
    refuted: for a part of a claim's text, the change of the tables that must refute it.
    """

    one: Experiment
    tables: Callable[[], dict[str, Rows]]
    refuted: Mapping[str, Change] = field(default_factory=dict)

    def claims(self, change: Change = lambda tables: None) -> list[Claim]:
        """Return the claims on the tables after a change."""
        rows = self.tables()
        change(rows)
        return list(self.one.claims({name: table(its) for name, its in rows.items()}))


def put(name: str, key: str, value: Any, row: int = 0) -> Change:
    """Return the change of one number of a table."""
    return lambda tables: tables[name][row].update({key: value})


def minima(name: str, *cells: tuple[float, int | None, float, float, float]) -> Callable[[], Any]:
    """Return a table of minima: η, B, a, s and the limit of s."""

    def rows() -> dict[str, Rows]:
        return {
            name: [
                {"lr": lr, "batch_size": size, "scale": 1.0, "seed": 0, "outcome": "reached"}
                | {"sharpness": a, "non_uniformity": s, "non_uniformity_limit": bound}
                for lr, size, a, s, bound in cells
            ]
        }

    return rows


def sharpness(*cells: tuple[float, float]) -> Callable[[], Any]:
    """Return a table of gradient descent's sharpness by learning rate."""
    return lambda: {
        "sharpness": [
            {"lr": lr, "seed": seed, "outcome": "reached", "sharpness": a}
            for lr, a in cells
            for seed in (0, 1)
        ]
    }


def toy() -> dict[str, Rows]:
    """Return escapes at three rates, also with halved derivatives, and a trajectory of GD."""
    cells = (("true", 0.5, 0), ("true", 0.6, 100), ("true", 0.7, 100), ("halved", 0.7, 1))
    escapes = [
        {"derivatives": which, "lr": lr, "seed": 0, "runs": 100, "steps": 9, "escaped": escaped}
        | {"share": escaped / 100, "low": escaped / 100, "high": escaped / 100, "median_step": 3}
        for which, lr, escaped in cells
    ]
    path = [{"optimizer": "GD", "lr": 0.7, "run": 0, "step": k, "x": 1 + 0.1**k} for k in (1, 2)]
    return {"escapes": escapes, "trajectories": path}


def diagram() -> dict[str, Rows]:
    """Return a plane of 1,000 points, 21.5 % of the box unstable, and two widths."""
    grown = [1.5] * 215 + [0.5] * 785 + [2.0] * 10
    plane = [
        {"batch_size": 1, "n": 2, "lr": 0.1, "seed": 0, "in_box": k < 1000}
        | {"growth": growth, "simulated": growth}
        for k, growth in enumerate(grown)
    ]
    widths = [
        {"w": 0.5, "theorem1": 0.9, "box": 1.2, "exact": 1.0, "radius_at_box": 1.1},
        {"w": 1.0, "theorem1": 1.0, "box": 1.06, "exact": 1.1, "radius_at_box": 0.9},
    ]
    return {"plane": plane, "two-dimensions": widths}


def counterexample() -> dict[str, Rows]:
    """Return two points of the curve, runs that stay, and runs that leave."""
    curve = [
        {"sharpness": a, "measured_sharpness": a, "non_uniformity": s}
        | {"measured_non_uniformity": s, "risk_from_weights": risk}
        for a, s, risk in ((2.0, 1.8, 2.0), (10.0, 9.0, 0.0))
    ]
    runs = [
        {"optimizer": "GD", "lr": lr, "batch_size": "all", "seed": seed, "limit": bound}
        | {"outcome": "reached", "sharpness": a, "risk": risk}
        for lr, bound, a, risk in ((0.15, 13.3, 9.9, 0.01), (0.25, 8.0, 7.9, 0.15))
        for seed in (0, 1)
    ]
    return {"curve": curve, "runs": runs}


def control_laws() -> dict[str, Rows]:
    """Return two seeds of each law: the staircase ends at the target, the others off it."""
    return {
        "ends": [
            {"law": law, "seed": seed, "target": 1.0, "diverged_at": None, "lr": 1.0}
            | {"sharpness": 1.05 if law == "gated staircase" else 2.0}
            | {"largest_loss": 0.03 if law == "jump" else 0.01}
            for law in LAWS
            for seed in (0, 1)
        ]
    }


def arrive(number: int) -> Change:
    """Return the change that lets both seeds of the law of this number end at the target."""
    return lambda tables: [
        row.update(sharpness=1.0, largest_loss=0.01)
        for row in tables["ends"][2 * number : 2 * number + 2]
    ]


def loss_shape() -> dict[str, Rows]:
    """Return a minimum, and courses of either loss: the sharpness rises, and falls with the loss."""
    course = [
        {"trained_by": loss, "lr": 0.5, "seed": 0, "step": k, "loss": 0.1**k, "sharpness": a}
        for loss, its in (("squared", (1, 2, 3.9)), ("cross-entropy", (2, 0.3, 0.1, 0.04, 0.02)))
        for k, a in enumerate(its)
    ]
    for row in course[-3:]:  # within a decade of the last loss
        row["loss"] = row["sharpness"]
    return {"minima": [{"lr": 0.5, "seed": 0, "trusted_rise": 1.5}], "course": course}


def escape() -> dict[str, Rows]:
    """Return Table 3's minimum, a run that stays and one that escapes, and a scatter."""
    point = {"sharpness": 19.0, "non_uniformity": 46.0, "test_accuracy": 0.8}
    minimum = {"random_labels": 0, "seed": 0, "lr": 0.1}
    before = {f"{key}_before": value for key, value in point.items()}
    after = {"sharpness_after": 3.0, "test_accuracy_after": 0.82}
    shared = {**minimum, **before, "loss_before": 1e-4, "loss_after": 1e-4, "right": True}
    switches = [
        {**shared, "how": "SGD, B = 1", "predicted": "escape", "escaped_at": 10, **after},
        {**shared, "how": "SGD, B = 100", "predicted": "stay", "escaped_at": None},
    ]
    for row in switches:
        row |= {"largest_loss_ratio": 5.0, "returned": False}
    scatter = [{"sharpness": 10.0**k, "test_accuracy": 0.8 - 0.1 * k} for k in range(4)]
    scatter[0]["test_accuracy"] -= 0.01  # a correlation of 1 has no interval
    return {"minima": [minimum | point], "switches": switches, "scatter": scatter}


def after_lbfgs() -> dict[str, Rows]:
    """Return a gain of a point over two seeds, and a limit that single steps exceed."""
    courses = [
        {
            "method": "SGD",
            "lr": 0.3,
            "random_labels": 0,
            "seed": seed,
            "step": step,
            "diverged": False,
        }
        | {"loss": 1e-3, "sharpness": 2.0, "gain": 0.005 * gain, "test": 0.8 + 0.005 * gain}
        for seed in (0, 1)
        for step, gain in ((0, 0), (100, 1), (1000, 2 + seed))
    ]
    ratios = (0.5, 1.5, 0.6, 0.7)
    limits = [
        {"random_labels": 0, "seed": 0, "step": step, "applied": ratio, "after": ratio}
        for step, ratio in enumerate(ratios)
    ]
    return {"courses": courses, "limits": limits}


def prediction() -> dict[str, Rows]:
    """Return confusions of either sampling in which the exact threshold is right most often."""
    shared = {"cases": 200, "said_escape_stayed": 1, "said_stay_escaped": 1}
    shares = {"box (9)": 0.97, "exact threshold": 0.98, "η/B alone": 0.95}
    epoch = {"threshold of the epoch": 0.99}
    return {
        "confusion": [
            {"sampling": sampling, "rule": rule, "right": right, **shared}
            for sampling, own in (("independent", {}), ("reshuffled", epoch))
            for rule, right in {**shares, **own}.items()
        ]
    }


def prediction_beyond() -> dict[str, Rows]:
    """Return confusions of two settings in which the exact threshold is well ahead."""
    shared = {"cases": 200, "said_escape_stayed": 1, "said_stay_escaped": 1}
    shares = {"box (9)": 0.95, "exact threshold": 0.99, "η/B alone": 0.9}
    return {
        "confusion": [
            {"setting": name, "rule": rule, "right": right, **shared}
            for name in ("heavy ball", "CNN")
            for rule, right in shares.items()
        ]
    }


def settling() -> dict[str, Rows]:
    """Return a run that stays within the mean-square threshold, and one that leaves for another."""
    shared = {"outcome": "reached", "start_sharpness": 4.0, "start_error": 1e-4, "end_error": 1e-4}
    stays = {"start_exponent": -1e-3, "end_sharpness": 3.9, "end_exponent": -1e-3, "end_ratio": 0.8}
    leaves = {"start_exponent": 1e-3, "end_sharpness": 2.0, "end_exponent": 2e-4, "end_ratio": 0.98}
    return {"settled": [shared | stays | {"end_box": 0.7}, shared | leaves | {"end_box": 0.9}]}


def edge() -> dict[str, Rows]:
    """Return a course of sharpness that ends at 2/η, and three places where SGD settles."""
    course = [
        {"lr": 1.0, "step": k, "loss": 0.1, "sharpness": a, "limit": 2.0}
        for k, a in enumerate((0.5, 3.0, 1.95, 2.1, 2.0))
    ]
    settled = [
        {"lr": 1.0, "batch_size": size, "outcome": "reached", "ratio": 1.05, "sharpness_ratio": 0.2}
        for size in (1, 4)
    ]
    unfinished = {**settled[0], "outcome": "out of steps", "ratio": 2.0}
    return {"sharpness": course, "settled": [*settled, unfinished]}


def quasi_newton() -> dict[str, Rows]:
    """Return L-BFGS's minimum of two seeds, and flatter and better ones by GD and SGD from there."""
    ends = {"L-BFGS": (10.0, 0.80), "L-BFGS, then GD": (4.0, 0.82), "L-BFGS, then SGD": (2.0, 0.84)}
    return {
        "solutions": [
            {"method": method, "seed": seed, "lr": 0.5, "sharpness": a, "test": test + seed / 500}
            | {"preconditioned_sharpness": 2.1, "preconditioned_sharpness_limit": 2.0}
            for method, (a, test) in ends.items()
            for seed in (0, 1)
        ]
    }


def steering() -> dict[str, Rows]:
    """Return runs of two seeds that keep their bounds: on sharpness above or below, and on s."""
    low, uniform = ("sharper",), ("more uniform", "both")
    keys = [("GD", "the minimum"), ("fixed", "none")]
    keys += [("steered", region) for region in (*REGIONS, "from scratch")]
    return {
        "runs": [
            {"method": method, "region": region, "seed": seed, "failed": 0.0, "loss": 1e-4}
            | {"sharpness": 4.0, "non_uniformity": 2.0, "said": "step 5: missed target"}
            | {"target_sharpness": None if region in (*low, "more uniform") else 2.0}
            | {"target_non_uniformity": 2.1 if region in uniform else None}
            | {"sharpness_to_target": None if region == "more uniform" else 1.05}
            for method, region in keys
            for seed in (0, 1)
        ]
    }


CASES = {
    "edge": Case(
        Edge(),
        edge,
        {
            "ends at 2/η": put("sharpness", "sharpness", 2.7, row=4),  # 12.5 % above, as mean of 3
            "below the exact threshold": put("settled", "ratio", 1.11),
        },
    ),
    "quasi-newton": Case(
        QuasiNewton(),
        quasi_newton,
        {
            "then GD: escapes to a flatter": put("solutions", "sharpness", 10.5, row=2),
            "then SGD: escapes to a flatter": put("solutions", "sharpness", None, row=5),
            "then GD: and to one that tests": put("solutions", "test", 0.80, row=2),  # 1 ± 1 points
            "then SGD: and to one that tests": put("solutions", "test", 0.80, row=4),
            "L-BFGS ends within": put("solutions", "preconditioned_sharpness", 2.3),
            "then GD ends within": put("solutions", "preconditioned_sharpness", 2.3, row=2),
            "then SGD ends within": put("solutions", "preconditioned_sharpness", 2.3, row=5),
        },
    ),
    "steering": Case(
        Steering(),
        steering,
        {
            "at a fixed learning rate": put("runs", "sharpness", 4.5, row=3),
            "1.5x flatter": put("runs", "sharpness_to_target", 1.11, row=5),
            "2x flatter": put("runs", "sharpness_to_target", 1.2, row=6),
            "4x flatter": put("runs", "failed", 1.0, row=8),
            "more uniform": put("runs", "non_uniformity", 2.2, row=10),
            "both": put("runs", "non_uniformity", 2.2, row=13),
            "sharper": put("runs", "sharpness_to_target", 0.89, row=14),
            "from scratch": put("runs", "sharpness_to_target", 1.11, row=16),
        },
    ),
    "prediction": Case(
        Prediction(),
        prediction,
        {
            "(independent batches)": put("confusion", "right", 0.99),
            "(reshuffled batches)": put("confusion", "right", 0.97, row=6),
        },
    ),
    "prediction-beyond": Case(
        PredictionBeyond(),
        prediction_beyond,
        {
            "(heavy ball)": put("confusion", "right", 0.97),
            "(CNN)": put("confusion", "cases", 199, row=4),
        },
    ),
    "settling": Case(
        Settling(),
        settling,
        {
            "only where the Lyapunov": put("settled", "end_exponent", 4e-4, row=1),
            "within the mean-square": put("settled", "end_ratio", 1.001, row=1),
            "within the box": put("settled", "end_box", 1.01, row=1),
            "SGD leaves": put("settled", "end_sharpness", 4.1, row=1),
            "SGD stays": put("settled", "end_sharpness", 2.9),
        },
    ),
    "after-lbfgs": Case(
        AfterLBFGS(),
        after_lbfgs,
        {
            "SGD after L-BFGS": put("courses", "gain", -0.02, row=2),
            "typical step of L-BFGS": put("limits", "applied", 2.0, row=2),
        },
    ),
    "escape": Case(
        Escape(data="fashion-mnist", lr=0.1),
        escape,
        {
            "Table 3, sharpness": put("minima", "sharpness", 22.0),  # 19.7 within 10 %
            "Table 3, non uniformity": put("minima", "non_uniformity", 40.0),
            "Table 3, test accuracy": put("minima", "test_accuracy", 0.9),
            "SGD, B = 1 from": put("switches", "right", False),
            "SGD, B = 100 from": put("switches", "right", False, row=1),
            "escapes end in flatter minima": put("switches", "sharpness_after", 20.0),
            "they test better": put("switches", "test_accuracy_after", 0.79),
            "Figure 1": put("scatter", "test_accuracy", 0.9, row=3),
        },
    ),
    "loss-shape": Case(
        LossShape(),
        loss_shape,
        {
            "around a minimum": put("minima", "trusted_rise", 0.9),
            "with the squared loss": put("course", "sharpness", 4.3, row=2),
            "with cross-entropy": put("course", "sharpness", 0.3, row=7),
        },
    ),
    "control-laws": Case(
        ControlLaws(),
        control_laws,
        {
            "the gated staircase": put("ends", "sharpness", 1.11, row=10),
            **{law: arrive(number) for number, law in enumerate(LAWS) if "stair" not in law},
        },
    ),
    "counterexample": Case(
        Counterexample(),
        counterexample,
        {
            "the flatter one tests worse, Appendix B": put(
                "curve", "risk_from_weights", 2.1, row=1
            ),
            "sharpness and non-uniformity": put("curve", "measured_sharpness", 2.001),
            "GD, η = 0.25 leaves": put("runs", "sharpness", 8.2, row=3),
        },
    ),
    "diagram": Case(
        Diagram(),
        diagram,
        {
            "no point outside the box": put("plane", "growth", 0.9, row=1005),
            "part of the box": lambda tables: [r.update(growth=1.5) for r in tables["plane"][:400]],
            "the half-ellipse": put("plane", "simulated", 0.5),
            "is not sufficient": put("two-dimensions", "radius_at_box", 0.99),
            "is it necessary": put("two-dimensions", "radius_at_box", 1.01, row=1),
            "condition (8)": put("two-dimensions", "theorem1", 1.01),
        },
    ),
    "toy": Case(
        Toy(),
        toy,
        {
            "SGD escapes at η = 0.7": put("escapes", "escaped", 99, row=2),
            "derivatives that the text quotes": put("escapes", "escaped", 0, row=3),
            "gradient descent at η = 0.7": put("trajectories", "x", 1.2, row=1),
            "stable in mean square": put("escapes", "share", 0.02),
            "unstable almost surely": put("escapes", "share", 0.98, row=1),
        },
    ),
    "gd-sharpness, digits": Case(
        GDSharpness(),
        sharpness((0.5, 4.1), (1.0, 1.9)),
        {
            "η = 0.5": put("sharpness", "sharpness", 4.4),  # the mean is 4.25, 6 % above 2/η
            "η = 1": put("sharpness", "sharpness", 2.4, row=2),  # 2.15, 8 % above
        },
    ),
    "gd-sharpness, printed": Case(
        GDSharpness(data="fashion-mnist"),
        sharpness((0.1, 19.0), (1.0, 1.9)),
        {
            "η = 0.1": put("sharpness", "sharpness", 17.0),  # the mean 18 is 8 % below 19.6
            "η = 1": put("sharpness", "sharpness", 2.2, row=2),
        },
    ),
    "batch-size": Case(
        BatchSize(batch_sizes=(4, 16)),
        minima(
            "batch-size",
            (0.5, 4, 1.0, 3.0, 4.0),
            (0.5, 16, 2.0, 5.0, 8.0),
            (0.5, None, 3.0, 6.0, 1e9),
        ),
        {
            "5a": put("batch-size", "sharpness", 2.5),
            "5b, non-uniformity against": put("batch-size", "non_uniformity", 7.0, row=1),
            "non-uniformity at B = 4": put("batch-size", "non_uniformity", 4.1),
        },
    ),
    "selection": Case(
        Selection(),
        minima("selection", (0.5, 4, 1.0, 3.9, 4.0), (0.5, 25, 2.0, 9.0, 10.0)),
        {"Figure 6": put("selection", "non_uniformity", 10.1, row=1)},
    ),
    "correlation": Case(
        Correlation(),
        minima("correlation", *((1.0, 4, a, 2.1 * a, 99.0) for a in (0.5, 1.0, 2.0, 4.0))),
        {"Figure 7": put("correlation", "non_uniformity", 0.1, row=3)},
    ),
}


def test_every_experiment_has_a_case() -> None:
    """Catches an experiment whose claims are not tested."""
    assert {name.partition(",")[0] for name in CASES} == {*NAMES}


@pytest.mark.parametrize("name", CASES)
def test_claims_hold_on_tables_made_to_hold(name: str) -> None:
    """Catches a claim that nothing can uphold, and one without a table that refutes it."""
    claims = CASES[name].claims()
    assert claims
    for claim in claims:
        assert claim.reproduced, claim
        assert claim.printed or claim.theory
        assert any(part in claim.what for part in CASES[name].refuted), claim.what


@pytest.mark.parametrize(
    ("name", "part"), [(n, p) for n, case in CASES.items() for p in case.refuted]
)
def test_claims_fail_on_tables_made_to_fail(name: str, part: str) -> None:
    """Catches a claim that nothing can refute, and a verdict that looks at other numbers."""
    claims = CASES[name].claims(CASES[name].refuted[part])
    (claim,) = (claim for claim in claims if part in claim.what)
    assert not claim.reproduced, claim


def test_seeds_that_diverged_refute_a_claim_and_are_named() -> None:
    """Catches verdicts over the seeds that are left, as if the others had not been run."""
    tables = {name: table(rows) for name, rows in after_lbfgs().items()}
    courses = tables["courses"]
    again = courses.assign(seed=courses.seed + 10, diverged=True, gain=math.nan)
    tables["courses"] = pd.concat([courses, again], ignore_index=True)
    for claim in AfterLBFGS().claims(tables):
        if "after L-BFGS" in claim.what:
            assert not claim.reproduced
            assert "seeds diverged" in claim.why
    rows = sharpness((0.5, 3.9))()["sharpness"]
    rows[1] |= {"outcome": "diverged", "sharpness": math.nan}
    (claim,) = GDSharpness(data="digits", lrs=(0.5,)).claims({"sharpness": table(rows)})
    assert (claim.reproduced, claim.ours) == (False, "3.9 (1 seed); 1 diverged")


@pytest.mark.parametrize("name", ["escapes", "trajectories"])
def test_a_shard_of_the_toy_makes_the_claims_that_it_can(name: str) -> None:
    """Catches a shard that ends with an error, because the other tables are on other machines."""
    rows = toy()[name]
    assert list(Toy().claims({name: table(rows)}))
    other = {"escapes": ("derivatives", "halved", 1), "trajectories": ("optimizer", "SGD", 0)}
    key, value, claims = other[name]
    kept = [row | {key: value} for row in rows]
    assert len(list(Toy().claims({name: table(kept)}))) == claims


PUBLISHED = sorted(RESULTS.glob("*/*/*/about.json"))


@pytest.mark.parametrize(
    "about", PUBLISHED, ids=[str(p.parent.relative_to(RESULTS)) for p in PUBLISHED]
)
def test_published_claims_follow_from_their_tables(about: Path) -> None:
    """Catches a claim that changed its verdict, or disappeared, since the results were published."""
    saved = json.loads(about.read_text())
    one = experiment(saved["experiment"]).from_json(saved["settings"])
    tables = {path.stem: read_table(path) for path in about.parent.glob("*.csv")}
    published = json.loads((about.parent / "claims.json").read_text())
    verdicts = [claim.reproduced for claim in one.claims(tables)]
    assert verdicts == [claim["reproduced"] for claim in published]
    assert all(isinstance(content, pd.DataFrame) for content in tables.values())
