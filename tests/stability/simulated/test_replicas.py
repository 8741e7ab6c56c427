"""The gradients of replicas, in both orders of work."""

from __future__ import annotations

import pytest
import torch
from sample_factors import factors

from stableopt.curvature.gram.gram import Modes
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.simulated import replicas
from stableopt.stability.simulated.replicas import Replicas


@pytest.mark.parametrize("worth_a_call", [0, 1 << 40], ids=["by sample", "by copy"])
def test_gradients_are_those_of_each_copy_alone(
    worth_a_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy that takes another's sample, and a mean over too many or too few."""
    monkeypatch.setattr(replicas, "_WORTH_A_CALL", worth_a_call)
    modes = Modes.from_factors(factors(5, 2, 4))
    copies = Replicas(modes, LinearStep(0.1), 2, 8, seed=0)
    copies.reshuffle()
    for size in (2, 2, 1):
        batch = copies.draw()
        assert batch.shape == (8, size)
        gradients = copies.gradients(batch)
        for samples, x, gradient in zip(batch, copies.state[0], gradients, strict=True):
            curvature = sum(modes.factors[i].T @ modes.factors[i] for i in samples) / size
            torch.testing.assert_close(gradient, curvature @ x)
