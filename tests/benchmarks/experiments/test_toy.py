"""The toy of two parabolas: derivatives, thresholds, and the chance to escape by enumeration."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small_run
from torch import nn

import stableopt
from benchmarks.experiments.toy.experiment import HALVED, TRUE, Toy
from benchmarks.experiments.toy.model import (
    CAUGHT,
    COEFFICIENTS,
    Walks,
    escape_steps,
    gradient,
    losses,
)


def test_gradients_are_the_losses_derivatives() -> None:
    """Catches a slope of the wrong branch, or a lost factor 2; the oracle is finite differences."""
    x = np.array([-2.0, -0.5, -0.4, 0.0, 0.2, 0.3, 0.5, 0.6, 1.0, 1.7, 3.0, 4.0])
    h = 1e-6
    for index, coefficient in enumerate(COEFFICIENTS):
        slopes = (losses(x + h)[index] - losses(x - h)[index]) / (2 * h)
        # Exact for parabolas but for rounding, eps · loss / h < 1e-8 here.
        np.testing.assert_allclose(gradient(x - 1, coefficient), slopes, atol=1e-7)


def test_curvature_at_the_minimum_is_measured_as_it_is_written() -> None:
    """Catches halved derivatives: the library measures a = 2, s = 1.8 and the threshold."""

    class Toyish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, c: torch.Tensor) -> torch.Tensor:
            return torch.minimum(self.x**2, c * (self.x - 1) ** 2)

    data = (torch.tensor([COEFFICIENTS], dtype=torch.float64).T, torch.zeros(2, 1))
    margins = stableopt.measure(
        Toyish(),
        lambda out, y: out.mean(),
        data,
        lr=0.7,
        batch_size=1,
        quantities=("sharpness", "non_uniformity"),
        tol=1e-9,
    )
    assert margins.sharpness == pytest.approx(TRUE.sharpness) == pytest.approx(2.0)
    assert margins.non_uniformity == pytest.approx(TRUE.non_uniformity) == pytest.approx(1.8)


@pytest.mark.parametrize("thresholds", [TRUE, HALVED])
def test_thresholds_are_where_growth_begins(thresholds) -> None:  # type: ignore[no-untyped-def]
    """Catches a formula of another root: one step's mean square, and mean logarithm, cross there."""
    h = np.array([thresholds.h1, thresholds.h2])
    mean_square, almost_sure = thresholds.mean_square, thresholds.almost_sure
    assert ((1 - mean_square * h) ** 2).mean() == pytest.approx(1)
    assert np.log(np.abs(1 - almost_sure * h)).mean() == pytest.approx(0, abs=1e-12)
    assert np.log(np.abs(1 - 0.99 * almost_sure * h)).mean() < 0
    assert abs(1 - thresholds.gd * h.mean()) == pytest.approx(1)


def test_the_share_that_escapes_is_that_of_all_sequences() -> None:
    """Catches uneven sampling, runs lost when others escape, and a step too many.

    The oracle is a plain loop over all 2^12 sequences of batches.
    """
    steps, lr, start = 12, 0.7, 0.1

    def escapes(sequence: tuple[int, ...]) -> bool:
        x = 1 + start
        for index in sequence:
            c = COEFFICIENTS[index]
            x -= lr * (2 * x if x**2 < c * (x - 1) ** 2 else 2 * c * (x - 1))
            if abs(x) < CAUGHT:
                return True
        return False

    sequences = list(itertools.product((0, 1), repeat=steps))
    exact = sum(map(escapes, sequences)) / len(sequences)
    assert 0.1 < exact < 0.9
    runs = 20_000
    share = (escape_steps(Walks(lr, runs, steps, start, seed=3)) > 0).mean()
    # Four standard deviations of the binomial.
    assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / runs))


def test_end_to_end(tmp_path: Path) -> None:
    """Catches a table without its claim, a picture that is not drawn, and a claim that holds
    for any numbers: the runs with halved derivatives stay.
    """
    toy = Toy(runs=100, steps=300, lrs=(0.5, 0.7))
    tables, drawn, _ = small_run(toy, tmp_path)
    assert drawn == {"functions", "escapes", "trajectories"}
    claims = toy.claims(tables)
    assert [claim.reproduced for claim in claims] == [True, False, True, True, True]
    escapes = tables["escapes"]
    shares = dict(
        zip(zip(escapes.derivatives, escapes.lr, strict=True), escapes.share, strict=True)
    )
    assert shares == {("true", 0.5): 0.0, ("true", 0.7): 1.0, ("halved", 0.7): 0.0}
