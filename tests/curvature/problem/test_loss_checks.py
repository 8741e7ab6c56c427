"""Losses that are not a mean over the samples are found out."""

from __future__ import annotations

import pytest
import torch
from monitored_runs import X
from torch import Tensor, nn

import stableopt
from stableopt.curvature import Hessian, Problem


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


def test_a_contrastive_loss_is_measured_as_the_mean_of_its_batches() -> None:
    """Catches a loss with in-batch negatives that has no way in, and a sum that has one."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = {"a": torch.randn(8, 4).double(), "b": torch.randn(8, 4).double()}

    def contrastive(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores = model(batch["a"]) @ model(batch["b"]).T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    with pytest.raises(ValueError, match=r"not a mean over samples.*batch_statistics=True"):
        Problem.from_batch_loss(encoder, contrastive, batch)
    problem = Problem.from_batch_loss(encoder, contrastive, batch, batch_statistics=True)
    names = [name for name, _ in encoder.named_parameters()]

    def flat(theta: Tensor) -> Tensor:
        parts = dict(
            zip(names, theta.split([p.numel() for p in encoder.parameters()]), strict=True)
        )
        shaped = {n: parts[n].view_as(p) for n, p in encoder.named_parameters()}
        outputs = [torch.func.functional_call(encoder, shaped, (batch[key],)) for key in ("a", "b")]
        return nn.functional.cross_entropy(outputs[0] @ outputs[1].T, torch.arange(8))

    at = torch.cat([p.detach().reshape(-1) for p in encoder.parameters()])
    dense = torch.autograd.functional.hessian(flat, at)
    vector = torch.randn(problem.num_params).double()
    # Products of the same second derivatives, in double precision.
    assert torch.allclose(Hessian(problem) @ vector, dense @ vector, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="a sum: use reduction='mean'"):
        Problem.from_batch_loss(
            encoder,
            lambda model, batch: model(batch["a"]).square().sum(),
            batch,
            batch_statistics=True,
        )
