"""`AdaptiveAccumulation` groups batches of one size into steps whose size can change."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from stableopt import AdaptiveAccumulation


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), micro=st.integers(1, 6), counts=st.lists(st.integers(1, 5), min_size=1)
)
def test_accumulation_is_the_mean_over_the_step(n: int, micro: int, counts: list[int]) -> None:
    """Catches shares that forget a ragged last batch, and a loader that ends within a step."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)
    loader = DataLoader(list(zip(x, x**2, strict=True)), batch_size=micro)
    accumulation = AdaptiveAccumulation(loader, micro)
    weight = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    mean, start = nn.MSELoss(), 0
    steps = iter(accumulation)
    for turn in range(10**6):
        accumulation.batch_size = micro * counts[turn % len(counts)]
        group = next(steps, None)
        if group is None:
            break
        weight.grad = None
        for share, (a, b) in group:
            (share * mean(weight * a, b)).backward()
        rows = slice(start, start + sum(len(batch[0]) for _, batch in group))
        (expected,) = torch.autograd.grad(mean(weight * x[rows], x[rows] ** 2), weight)
        # Sums of at most 30 terms of size one in float64.
        torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-14)
        start = rows.stop
    assert start == n


def test_accumulation_refuses_what_its_loader_cannot_give() -> None:
    """Catches a size between two multiples that is silently rounded."""
    batches = [torch.zeros(4)] * 3
    accumulation = AdaptiveAccumulation(batches, 4, max_batch_size=12)
    assert accumulation.batch_size == 4
    assert accumulation.nearest(7) == 8
    assert accumulation.nearest(100) == 12
    with pytest.raises(ValueError, match="batch_size=6"):
        accumulation.batch_size = 6
    with pytest.raises(ValueError, match="batch_size=6"):
        AdaptiveAccumulation(batches, 4, 6)
    accumulation.resize(8)
    assert len(accumulation) == 2
    other = AdaptiveAccumulation(batches, 4)
    other.load_state_dict(accumulation.state_dict())
    assert other.batch_size == 8
    assert list(AdaptiveAccumulation([], 4)) == []


@pytest.mark.parametrize(
    ("sizes", "micro", "whole"),
    [
        ([16, 16], 8, 0),
        ([2, 2], 8, 0),
        ([8, 8, 8, 5, 8], 8, 1),
        ([8, 5, 8, 8], 8, 0),
        ([8, 8, 9], 8, 1),
        ([8, 8, 8, 5], 8, 2),
        ([8, 8, 3], 8, 2),
        ([3], 8, 1),
    ],
)
def test_accumulation_refuses_batches_of_another_size(
    sizes: list[int], micro: int, whole: int
) -> None:
    """Catches steps of 32 samples where `batch_size` says 16, and a refused last batch."""
    accumulation = AdaptiveAccumulation([torch.zeros(n) for n in sizes], micro, 2 * micro)
    groups = []
    fits = set(sizes[:-1]) <= {micro} and sizes[-1] <= micro
    with nullcontext() if fits else pytest.raises(ValueError, match=f"micro_batch_size={micro}: a"):
        groups.extend(iter(accumulation))
    for group in accumulation if fits else ():
        assert sum(len(batch) for _, batch in group) <= accumulation.batch_size
    assert len(groups) == whole


def test_accumulation_weighs_batches_as_the_loss_does() -> None:
    """Catches weights by samples for a mean over tokens: 63 % off, without an error."""
    torch.manual_seed(0)
    x, y = torch.randint(7, (2, 16, 12))
    for row in range(16):
        y[row, 12 if row < 8 else 2 :] = -100
    y[4:8] = -100  # a batch without any target
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)).double()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    expected = torch.autograd.grad(loss(x, y), list(model.parameters()))
    with pytest.raises(ValueError, match=r"ignored targets \(-100\).*sample_weight="):
        list(AdaptiveAccumulation(batches, 4, 16))
    (group,) = AdaptiveAccumulation(
        batches, 4, 16, sample_weight=lambda batch: (batch[1] != -100).sum(1)
    )
    model.zero_grad()
    for share, batch in group:
        (share * loss(*batch)).backward()
    # Sums of some hundred terms in double precision.
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], list(expected), rtol=1e-12, atol=1e-14
    )
