"""Loops over chunks and samples against loops over single samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt.curvature import Problem
from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.over_chunks import (
    gather_over_chunks,
    mean_over_chunks,
    vmap_over_samples,
)

X = torch.arange(10, dtype=torch.float64).reshape(5, 2)


def problem_in_chunks(chunk_size: int | None) -> Problem:
    data = (X, torch.zeros(5, 1, dtype=torch.float64))
    return Problem(nn.Linear(2, 1).double(), nn.MSELoss(), data, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
def test_every_sample_has_the_same_weight(chunk_size: int | None) -> None:
    """Catches a mean of the chunks' means, in which a smaller last chunk weighs too much."""
    problem = problem_in_chunks(chunk_size)
    total = torch.zeros(2, dtype=torch.float64)

    def add(batch: Any, size: int) -> None:
        assert measuring()
        assert size == len(batch[0])
        total.add_(batch[0].sum(0))

    [mean] = mean_over_chunks(problem, [total], add, problem.chunks())
    torch.testing.assert_close(mean, X.mean(0))


def test_an_evaluation_is_entered_once() -> None:
    """Catches a nested evaluation, which would draw the same random numbers for each term again."""
    problem, total, drawn = problem_in_chunks(1), torch.zeros(1), []

    def add(batch: Any, size: int) -> None:
        drawn.append(float(torch.rand(())))

    with problem.evaluation():
        for _ in range(2):
            mean_over_chunks(problem, [total], add, problem.chunks(), evaluating=True)
    assert len(set(drawn)) == 10


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_rows_are_gathered_in_the_order_of_samples(chunk_size: int | None) -> None:
    """Catches chunks that are exchanged or dropped."""
    rows = gather_over_chunks(problem_in_chunks(3), lambda batch, size: 2 * batch[0], chunk_size)
    assert torch.equal(rows, 2 * X)


def test_vmap_gives_each_sample_as_a_batch_of_one() -> None:
    """Catches samples without their dimension, and scalars that are taken for samples."""

    def scaled_sum(sample: dict[str, Tensor], row: Tensor) -> Tensor:
        assert sample["x"].shape == (1, 2)
        assert sample["scale"].dim() == 0
        return sample["scale"] * sample["x"].sum() + row

    batch = {"x": X, "scale": torch.tensor(3.0, dtype=torch.float64)}
    rows = torch.arange(5, dtype=torch.float64)
    assert torch.equal(vmap_over_samples(scaled_sum, batch, 5, rows), 3 * X.sum(1) + rows)
