"""The counterexample's algebra, against sampled test inputs and dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import small_run
from torch import nn

from benchmarks.experiments.counterexample.experiment import Counterexample
from benchmarks.experiments.counterexample.model import Curve, Descent, Model, scales

CURVE = Curve(6, 0.9)


@pytest.mark.parametrize("q", [0.0, 0.4, 1.0])
def test_curvature_is_that_of_dense_hessians(q: float) -> None:
    """Catches a missing factor 2 and a wrong mean in s; the oracle is autograd on each sample."""
    x, y = CURVE.data()
    weights = torch.tensor([1 - q**2, q], dtype=torch.float64)

    def loss(w: torch.Tensor, i: int) -> torch.Tensor:
        return (w[0] * x[i, 0] + w[1] ** 2 * x[i, 1] - y[i, 0]) ** 2

    each = torch.stack(
        [torch.autograd.functional.hessian(lambda w, i=i: loss(w, i), weights) for i in range(6)]
    )
    mean = each.mean(0)
    spread = (each @ each).mean(0) - mean @ mean
    assert float(torch.linalg.eigvalsh(mean)[-1]) == pytest.approx(CURVE.sharpness(q))
    assert float(torch.linalg.eigvalsh(spread)[-1]) ** 0.5 == pytest.approx(
        0.9 * CURVE.sharpness(q)
    )


def test_risk_is_the_error_on_normal_inputs() -> None:
    """Catches a risk for other inputs or another target function; the oracle is 200,000 samples."""
    x = torch.randn(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.6, 1.0):
        with torch.no_grad():
            error = float(nn.functional.mse_loss(Model(1 - q**2, q)(x), x[:, 1:]))
        # The standard error of a mean of squared normals is √(2/200,000) = 0.3 % of it.
        assert error == pytest.approx(CURVE.risk(q), rel=0.015, abs=1e-12)
        assert CURVE.risk_at(CURVE.sharpness(q)) == pytest.approx(CURVE.risk(q), abs=1e-12)


def test_the_limit_is_where_the_mean_square_begins_to_grow() -> None:
    """Catches a noise factor of another batch size; the oracle is one step along u on each sample."""
    lr = 0.15
    a = CURVE.limit(lr, 1)
    h = a * scales(6, 0.9).square()
    assert float(((1 - lr * h) ** 2).mean()) == pytest.approx(1)
    assert CURVE.limit(lr, None) == pytest.approx(2 / lr)


def test_a_run_that_diverges_says_so() -> None:
    """Catches a diverged run that is measured and counts as a minimum."""
    assert Descent(lr=1.0).run(None)["outcome"] == "diverged"  # type: ignore[arg-type]


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a run at the larger rate that does not leave, and a claim upheld by an unrelated run."""
    counterexample = Counterexample(seeds=(0,), lrs=(0.15, 0.25), batch_sizes=(1,))
    tables, drawn, _ = small_run(counterexample, tmp_path)
    assert drawn == {"curve", "runs"}
    claims = list(counterexample.claims(tables))
    assert len(claims) == 4
    assert all(claim.reproduced for claim in claims)
    same = {**tables, "runs": tables["runs"].assign(risk=0.1)}
    assert not list(counterexample.claims(same))[-1].reproduced
