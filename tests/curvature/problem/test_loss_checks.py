"""Losses that are not a mean over the samples are found out."""

from __future__ import annotations

import pytest
import torch
from monitored_runs import X
from torch import nn

import stableopt


def test_samples_that_see_each_other_are_named() -> None:
    """Catches a loss of the batch as a whole, whose mean over chunks is another loss."""
    torch.manual_seed(0)
    model, targets = nn.Linear(2, 3), torch.randn(12, 3)

    def spread(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).var(0, correction=0).sum()

    problem = stableopt.Problem(model, spread, (X, targets))
    assert not problem.equal_weights
    with pytest.raises(ValueError, match=r"samples' own Hessians.*they see each other"):
        stableopt.critical_lr(problem, batch_size=2)
    with pytest.raises(
        ValueError, match=r"they see each other.*chunk_size= for one chunk \(now 3\)"
    ):
        stableopt.Problem(model, spread, (X, targets), chunk_size=5)
    whole = stableopt.Problem(model, spread, (X, targets), chunk_size=5, batch_statistics=True)
    assert whole.num_samples == 12
