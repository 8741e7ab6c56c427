"""The claims of every experiment hold on tables made to uphold them, and fail on changed ones.

``CASES`` has an entry for each experiment: tables that uphold all its claims, and for each claim a
change that refutes it. A test also recomputes the claims of every published result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import claim_tables
import pandas as pd
import pytest
from claim_tables import Change, Rows, arrive, put

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
from benchmarks.experiments.toy.experiment import Toy
from benchmarks.framework.claims import Claim
from benchmarks.framework.experiment import Experiment
from benchmarks.framework.tables import read_table, table

RESULTS = Path(benchmarks.__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """An experiment, tables that uphold its claims, and changes that refute them.

    Attributes:
        experiment: The experiment, with its settings.
        tables: Returns the rows of each table, by name; all claims hold on them.
        refuted: Maps a part of a claim's text to the change of the tables that refutes the claim.
    """

    experiment: Experiment
    tables: Callable[[], dict[str, Rows]]
    refuted: Mapping[str, Change] = field(default_factory=dict)

    def claims(self, change: Change = lambda tables: None) -> list[Claim]:
        """Return the claims on the tables after a change."""
        rows = self.tables()
        change(rows)
        return list(
            self.experiment.claims({name: table(content) for name, content in rows.items()})
        )


CASES = {
    "edge": Case(
        Edge(),
        claim_tables.edge,
        {
            "ends at 2/η": put("sharpness", "sharpness", 2.7, row=4),  # 12.5 % above, as mean of 3
            "below the exact threshold": put("settled", "ratio", 1.11),
        },
    ),
    "quasi-newton": Case(
        QuasiNewton(),
        claim_tables.quasi_newton,
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
        claim_tables.steering,
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
        claim_tables.prediction,
        {
            "(independent batches)": put("confusion", "right", 0.99),
            "(reshuffled batches)": put("confusion", "right", 0.97, row=6),
        },
    ),
    "prediction-beyond": Case(
        PredictionBeyond(),
        claim_tables.prediction_beyond,
        {
            "(heavy ball)": put("confusion", "right", 0.97),
            "(CNN)": put("confusion", "cases", 199, row=4),
        },
    ),
    "settling": Case(
        Settling(),
        claim_tables.settling,
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
        claim_tables.after_lbfgs,
        {
            "SGD after L-BFGS": put("courses", "gain", -0.02, row=2),
            "typical step of L-BFGS": put("limits", "applied", 2.0, row=2),
        },
    ),
    "escape": Case(
        Escape(data="fashion-mnist", lr=0.1),
        claim_tables.escape,
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
        claim_tables.loss_shape,
        {
            "around a minimum": put("minima", "trusted_rise", 0.9),
            "with the squared loss": put("course", "sharpness", 4.3, row=2),
            "with cross-entropy": put("course", "sharpness", 0.3, row=7),
        },
    ),
    "control-laws": Case(
        ControlLaws(),
        claim_tables.control_laws,
        {
            "the gated staircase": put("ends", "sharpness", 1.11, row=10),
            **{law: arrive(number) for number, law in enumerate(LAWS) if "stair" not in law},
        },
    ),
    "counterexample": Case(
        Counterexample(),
        claim_tables.counterexample,
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
        claim_tables.diagram,
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
        claim_tables.toy,
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
        claim_tables.sharpness((0.5, 4.1), (1.0, 1.9)),
        {
            "η = 0.5": put("sharpness", "sharpness", 4.4),  # the mean is 4.25, 6 % above 2/η
            "η = 1": put("sharpness", "sharpness", 2.4, row=2),  # 2.15, 8 % above
        },
    ),
    "gd-sharpness, printed": Case(
        GDSharpness(data="fashion-mnist"),
        claim_tables.sharpness((0.1, 19.0), (1.0, 1.9)),
        {
            "η = 0.1": put("sharpness", "sharpness", 17.0),  # the mean 18 is 8 % below 19.6
            "η = 1": put("sharpness", "sharpness", 2.2, row=2),
        },
    ),
    "batch-size": Case(
        BatchSize(batch_sizes=(4, 16)),
        claim_tables.minima(
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
        claim_tables.minima("selection", (0.5, 4, 1.0, 3.9, 4.0), (0.5, 25, 2.0, 9.0, 10.0)),
        {"Figure 6": put("selection", "non_uniformity", 10.1, row=1)},
    ),
    "correlation": Case(
        Correlation(),
        claim_tables.minima(
            "correlation", *((1.0, 4, a, 2.1 * a, 99.0) for a in (0.5, 1.0, 2.0, 4.0))
        ),
        {"Figure 7": put("correlation", "non_uniformity", 0.1, row=3)},
    ),
}


def test_every_experiment_has_a_case() -> None:
    """Catches an experiment whose claims are not tested."""
    assert {name.partition(",")[0] for name in CASES} == {*NAMES}


@pytest.mark.parametrize("name", CASES)
def test_claims_hold_on_tables_made_to_hold(name: str) -> None:
    """Catches a claim that fails on any table, and a claim without a change that refutes it."""
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
    """Catches a claim that holds on any table, and a verdict computed from the wrong column."""
    claims = CASES[name].claims(CASES[name].refuted[part])
    (claim,) = (claim for claim in claims if part in claim.what)
    assert not claim.reproduced, claim


def test_seeds_that_diverged_refute_a_claim_and_are_named() -> None:
    """Catches verdicts over the remaining seeds that ignore those that diverged."""
    tables = {name: table(rows) for name, rows in claim_tables.after_lbfgs().items()}
    courses = tables["courses"]
    again = courses.assign(seed=courses.seed + 10, diverged=True, gain=math.nan)
    tables["courses"] = pd.concat([courses, again], ignore_index=True)
    for claim in AfterLBFGS().claims(tables):
        if "after L-BFGS" in claim.what:
            assert not claim.reproduced
            assert "seeds diverged" in claim.why
    rows = claim_tables.sharpness((0.5, 3.9))()["sharpness"]
    rows[1] |= {"outcome": "diverged", "sharpness": math.nan}
    (claim,) = GDSharpness(data="digits", lrs=(0.5,)).claims({"sharpness": table(rows)})
    assert (claim.reproduced, claim.ours) == (False, "3.9 (1 seed); 1 diverged")


@pytest.mark.parametrize("name", ["escapes", "trajectories"])
def test_a_shard_of_the_toy_makes_the_claims_that_it_can(name: str) -> None:
    """Catches an error in a shard that has only one table because others are on other machines."""
    rows = claim_tables.toy()[name]
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
    configured = experiment(saved["experiment"]).from_json(saved["settings"])
    tables = {path.stem: read_table(path) for path in about.parent.glob("*.csv")}
    recorded = json.loads((about.parent / "claims.json").read_text())
    verdicts = [claim.reproduced for claim in configured.claims(tables)]
    assert verdicts == [claim["reproduced"] for claim in recorded]
    assert all(isinstance(content, pd.DataFrame) for content in tables.values())
