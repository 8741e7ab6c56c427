"""The shape of the loss: a line through a polynomial, and the courses, small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import small_run
from torch import nn

import stableopt
from benchmarks.experiments.loss_shape.experiment import LossShape
from benchmarks.experiments.loss_shape.jobs import Course, loss_along, trusted_rise
from benchmarks.runner import Place, Store, run_all
from benchmarks.training.data import Dataset
from benchmarks.training.networks import network


def test_the_line_is_the_loss_and_comes_back() -> None:
    """Catches weights in another order than the vector's, and weights that are left displaced."""
    model = nn.Linear(2, 1).double()
    x, y = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.5]]).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    direction = torch.tensor([0.6, 0.0, 0.8]).double()  # two weights, then the bias
    loss_at, slope = loss_along(model, nn.MSELoss(), (x, y), direction)
    residual = float(before @ torch.tensor([1.0, 2.0, 1.0]).double()) - 0.5
    assert loss_at(0.3) == pytest.approx((residual + 0.3 * (0.6 + 0.8)) ** 2)
    assert slope == pytest.approx(2 * residual * 1.4)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


def test_trust_ends_on_the_side_where_the_loss_departs_first() -> None:
    """Catches a search on one side only, a missing slope, and a rise in other units."""

    def loss(t: float) -> float:
        return 3 + 0.2 * t + 2 * t**2 + (10 * (t + 1) if t < -1 else 0.0)

    # Off at t = −1, where the rise is 2 = 2/3 of the first loss; by a tenth of 5 just after it:
    # 10 |t + 1| = 0.1 (3 + 2 t²) at t = −1.0522, a rise of 0.738. Steps are 12 % apart.
    assert 0.738 / 10**0.05 <= trusted_rise(loss, 3.0, 0.2, 4.0) <= 0.738


def test_cross_entropys_course_starts_from_the_same_weights(tmp_path: Path) -> None:
    """Catches a course trained by another loss than its name says, or from other weights."""
    store = Store(tmp_path)
    data = Dataset("digits", 50)
    jobs = [Course(data, loss, 0.5, 0, 3, 2) for loss in ("squared", "cross-entropy")]
    assert not run_all(jobs, store, Place()).failed
    images = data.load()
    out = network("digits", seed=0)(images.x).detach()
    squared, entropy = (store.result(job)["course"][0]["loss"] for job in jobs)
    assert squared == pytest.approx(float((out - images.y).square().mean()), rel=1e-5)
    for job, loss_fn in zip(jobs, (nn.MSELoss(), nn.CrossEntropyLoss()), strict=True):
        margins = stableopt.measure(
            network("digits", seed=0), loss_fn, (images.x, images.y), lr=0.5, max_iter=300
        )
        # Relative to the eigenvalue once, not twice; the two losses are the same up to rounding.
        assert store.result(job)["course"][0]["relative_residual"] == pytest.approx(
            margins.measurements["sharpness"].residual, rel=1e-2
        )
    log_p = out.log_softmax(1)
    assert entropy == pytest.approx(float(-(log_p * images.y).sum(1).mean()), rel=1e-5)


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a table without a figure, and a claim that no result can refute."""
    loss_shape = LossShape(n=40, lrs=(1.0,), target_loss=0.04, course_steps=30, looks=4)
    tables, drawn, _ = small_run(loss_shape, tmp_path)
    assert drawn == {"line", "course"}
    line, minima = tables["line"], tables["minima"]
    middle = line.loc[line.t.abs().idxmin()]
    at_zero = pytest.approx(minima.loss[0], rel=1e-12)  # its t is 1e-17 or so
    assert middle.loss == at_zero
    assert middle.quadratic == at_zero
    claims = {claim.what.split()[0]: claim for claim in loss_shape.claims(tables)}
    narrow = {"minima": minima.assign(trusted_rise=0.1)}
    assert not next(iter(loss_shape.claims(narrow))).reproduced
    assert not claims["with"].reproduced  # thirty steps of cross-entropy are not enough
