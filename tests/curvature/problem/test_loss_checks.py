"""Losses that are not a mean over the samples are found out."""

from __future__ import annotations

import pytest
import torch
from monitored_runs import X
from torch import nn

import stableopt


def test_losses_that_weigh_samples_are_named() -> None:
    """Catches class weights, whose mean over chunks is another loss."""
    torch.manual_seed(0)
    model, labels = nn.Linear(2, 3), torch.arange(12) % 3
    equal = nn.CrossEntropyLoss()
    stableopt.Problem(model, equal, (X, labels))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 0.1]))
    with torch.no_grad():
        model.weight.mul_(5)
    with pytest.warns(UserWarning, match="weighs samples unequally"):
        stableopt.Problem(model, weighted, (X, labels))
