"""Ranks with a shard of the probe set each measure what one process measures on all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import covariance
from rank_processes import run
from rank_workers.measuring import differenced, margins_of_all, weighted
from weighted_losses import WEIGHTED, built, sample_hessians

from stableopt import Problem
from stableopt.curvature import DualCurvature


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return margins_of_all()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_measure_what_one_process_does(
    size: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    """Catches a mean of means (shards are unequal), a sum of this rank's samples alone, samples of
    other ranks left out of a Gram matrix or of the batches, and ranks that go different ways.
    """
    ranks = run(margins_of_all, size, tmp_path)
    for found in ranks:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            # Sums in another order, and a search that stops at a residual of 1e-10; 1e-6 is what a
            # reader is promised.
            torch.testing.assert_close(
                torch.tensor(found[name], dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                rtol=1e-9,
                atol=1e-12,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize(("size", "chunk_size"), [(2, 10), (3, 1)])
def test_samples_have_their_weights_on_all_ranks(
    size: int, chunk_size: int, tmp_path: Path
) -> None:
    """Catches weights that cancel within a rank, and the refusal of a rank whose samples all have weight
    zero: in the order of the weights that is the first.
    """
    ranks = run(weighted, size, tmp_path, chunk_size)
    for name in WEIGHTED:
        case = built(name)
        samples = sample_hessians(case)
        generator = torch.Generator().manual_seed(5)
        vector = torch.randn(samples.shape[1], generator=generator, dtype=torch.float64)
        problem = Problem(case.model, case.loss, case.data, sample_weight=case.sample_weight)
        sharpness = DualCurvature.from_problem(problem).sharpness
        for found in ranks:
            expected = {"hessian": samples.mean(0) @ vector}
            for method in ("structured", "vmap", "loop"):
                expected[method] = covariance(samples) @ vector
            for method, exact in expected.items():
                product = torch.tensor(found[f"{name} {method}"], dtype=torch.float64)
                # Sums of the same numbers in another order, in double precision.
                assert (product - exact).norm() <= 1e-12 * exact.norm(), (name, method)
            assert found[f"{name} sharpness"] == pytest.approx(sharpness, rel=1e-12)


def test_a_rank_without_a_second_derivative_takes_all_to_differences(tmp_path: Path) -> None:
    """Catches ranks that go different ways, and report different errors, where one has a kernel that
    the other has not.
    """
    alone = differenced()
    assert alone["method"] == "double backward"
    zero, one = run(differenced, 2, tmp_path)
    assert "rank 1 found it so" in zero.pop("obstacle")
    assert "'1' (Sine) cannot be differentiated twice" in one.pop("obstacle")
    assert zero == one
    assert zero["method"] == "central differences"
    assert zero["converged"]
    for name in ("sharpness", "non_uniformity", "batch_sharpness"):
        # Differences in double precision are good to 1e-8, values to the square of tol=1e-3.
        assert zero[name] == pytest.approx(alone[name], rel=1e-5)
