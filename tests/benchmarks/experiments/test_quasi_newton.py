"""The quasi-Newton comparison: the search, the seeds at its rate, and the claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run

from benchmarks.experiments.quasi_newton.experiment import LBFGS, QuasiNewton
from benchmarks.experiments.quasi_newton.jobs import (
    METHODS,
    Budget,
    Search,
    Trained,
    Training,
    halves,
)
from benchmarks.framework.plotting import coloured
from benchmarks.framework.tables import table
from benchmarks.runner import Job
from benchmarks.training.data import Dataset

SMALL = QuasiNewton(
    seeds=(0, 1),
    n=40,
    random_labels=6,
    max_steps=6,
    min_steps=4,
    lbfgs_lrs=(0.3, 1.0),
    gd_lrs=(0.5,),
    sgd_lrs=(0.5,),
    adam_lrs=(3e-3,),
    adahessian_lrs=(0.15,),
    apollo_lrs=(0.3,),
    shampoo_lrs=(0.1,),
)


class Answers:
    """The results of trials, by learning rate."""

    def __init__(self, found: dict[float, tuple[float | None, float]]) -> None:
        self.found = found

    def result(self, need: Job) -> Trained:
        assert isinstance(need, Training)
        assert need.lr is not None
        loss, validation = self.found[need.lr]
        return Trained(need.lr, 1, loss, validation, -validation, *[None] * 4)


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({0.1: (1e-3, 0.8), 0.3: (1e-3, 0.9)}, 0.3),
        ({0.1: (1e-2, 0.8), 0.3: (1.1e-2, 0.9)}, 0.1),  # ten times the target counts as nearly
        ({0.1: (1e-3, 0.8), 0.3: (None, 0.9)}, 0.1),  # diverged
        ({0.1: (None, 0.1), 0.3: (1.0, 0.2)}, 0.3),
    ],
)
def test_the_search_takes_what_got_there_and_validates_best(
    found: dict[float, tuple[float | None, float]], best: float
) -> None:
    """Catches a rate chosen on the reported half of the test set, or by a run that did not train."""
    trials = tuple(Training(Dataset(), "GD", 0, Budget(), lr=lr) for lr in found)
    assert Search(trials).run(Answers(found)) == {"lr": best}  # type: ignore[arg-type]


def test_halves_are_disjoint_and_all() -> None:
    """Catches samples that are used for both the choice and the report."""
    images = Dataset("digits", 1000).load()
    first, second = halves(images)
    assert len(first.test_x) + len(second.test_x) == len(images.test_x)
    assert torch.equal(first.test_labels, images.test_labels[::2])
    assert torch.equal(second.test_x, images.test_x[1::2])


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a method that does not fit the loop, and a job that runs twice.

    Also catches a run that starts from another seed's L-BFGS minimum, or ignores the chosen rate.
    """
    tables, drawn, store = small_run(SMALL, tmp_path)
    assert drawn == {"solutions"}
    assert len(tables["searched"]) == len(METHODS) + 1
    assert len(tables["solutions"]) == 2 * len(METHODS)
    plan = SMALL._plan()
    for name, (search, (first, second)) in plan.items():
        lr = store.result(search).lr
        assert store.result(first).lr == store.result(second).lr == lr
        (trial,) = (trial for trial in search.trials if trial.lr == lr)
        assert store.result(first) == store.result(trial)
        if METHODS[name].from_minimum:
            assert (first.start, second.start) == tuple(plan[LBFGS][1])
    # GD continues from L-BFGS's end: after four steps it is below the loss that L-BFGS began with.
    start, gone_on = plan[LBFGS][1][1], plan["L-BFGS, then GD"][1][1]
    assert store.result(gone_on).loss < 1.5 * store.result(start).loss


def test_each_method_has_its_own_colour() -> None:
    """Catches two methods that look the same in the figure."""
    colours = [colour for _, colour in coloured(METHODS)]
    assert len(set(colours)) == len(METHODS)


def test_claims_follow_the_numbers() -> None:
    """Catches an escape to a sharper minimum that upholds a claim, and gains across different seeds."""

    def row(method: str, seed: int, a: float, test: float) -> dict[str, Any]:
        end = {"method": method, "seed": seed, "lr": 1.0, "sharpness": a, "test": test}
        return {**end, "preconditioned_sharpness": None, "preconditioned_sharpness_limit": None}

    before = [row(LBFGS, 0, 10.0, 0.8), row(LBFGS, 1, 6.0, 0.9)]
    after = [row("L-BFGS, then GD", 0, 8.0, 0.85), row("L-BFGS, then GD", 1, 5.0, 0.94)]
    verdicts = [c.reproduced for c in SMALL.claims({"solutions": table(before + after)})]
    assert verdicts == [True, True]
    after[1]["sharpness"], after[1]["test"] = 7.0, 0.91  # gains of 5 and 1 points: 3 ± 4
    verdicts = [c.reproduced for c in SMALL.claims({"solutions": table(before + after)})]
    assert verdicts == [False, False]
    after[1]["sharpness"] = 5.9  # a run that stays becomes a little flatter
    escapes, _ = SMALL.claims({"solutions": table(before + after)})
    assert not escapes.reproduced
    before[1]["sharpness"], after[1]["sharpness"] = 1.9, 1.88
    escapes, _ = SMALL.claims({"solutions": table(before + after)})
    assert escapes.why == "1 of 2 start above 2/η, and end at 0.80 of the start; the others at 0.99"
