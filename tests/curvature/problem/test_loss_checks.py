"""Losses that are not a mean over the samples: detected, and named in errors."""

from __future__ import annotations

from functools import partial

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
    of_batches = stableopt.Problem(model, spread, (X, targets), chunk_size=5, batch_statistics=True)
    assert of_batches.num_samples == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_auxiliary_loss_of_a_router_is_found(dtype: torch.dtype) -> None:
    """Catches a small term of the whole batch, a thousandth of the loss, that passes as rounding."""
    torch.manual_seed(0)
    experts, router = nn.Linear(3, 8), nn.Linear(3, 4)
    model = nn.ModuleList([experts, router]).to(dtype)
    data = {"x": torch.randn(24, 3, dtype=dtype), "y": torch.randn(24, 2, dtype=dtype)}

    def routed(model: nn.Module, batch: dict[str, Tensor], share: float) -> Tensor:
        odds = router(batch["x"]).softmax(-1)
        outputs = (experts(batch["x"]).relu().view(-1, 4, 2) * odds[..., None]).sum(1)
        chosen = nn.functional.one_hot(odds.argmax(-1), 4).to(odds)
        balance = 4 * (chosen.mean(0) * odds.mean(0)).sum()  # Switch Transformers, equation 4
        return nn.functional.mse_loss(outputs, batch["y"]) + share * balance

    with pytest.raises(ValueError, match=r"they see each other.*batch_statistics=True"):
        Problem.from_batch_loss(model, partial(routed, share=1e-3), data, chunk_size=8)
    one_batch = Problem.from_batch_loss(model, partial(routed, share=1e-3), data)
    with pytest.raises(ValueError, match="only the sharpness is defined"):
        stableopt.curvature.NonUniformity(one_batch)
    batches = Problem.from_batch_loss(
        model, partial(routed, share=1e-3), data, chunk_size=8, batch_statistics=True
    )
    chunks = [{key: value[i : i + 8] for key, value in data.items()} for i in (0, 8, 16)]
    losses = torch.stack([routed(model, chunk, share=1e-3) for chunk in chunks]).detach()
    assert batches.value() == pytest.approx(float(losses.mean()), rel=1e-6)
    assert Problem.from_batch_loss(
        model, partial(routed, share=0.0), data, chunk_size=8
    ).equal_weights


def test_rounding_is_no_weight() -> None:
    """Catches a refusal where rounding in single precision flips a ReLU: double precision tells."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU())
    x, y = torch.randint(-3, 4, (64, 6)).float(), torch.randn(64, 64)
    with torch.no_grad():  # small fractions, whose sums are often about zero
        model[0].weight.copy_(torch.randint(-2, 3, (512, 6)) / 3)
        model[0].bias.zero_()
    assert Problem(model, nn.MSELoss(), (x, y), chunk_size=16).equal_weights


def test_a_contrastive_loss_is_measured_as_the_mean_of_its_batches() -> None:
    """Catches a refusal of losses with in-batch negatives, and a sum that is accepted."""
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

    def loss_at(theta: Tensor) -> Tensor:
        tensors = dict(
            zip(names, theta.split([p.numel() for p in encoder.parameters()]), strict=True)
        )
        shaped = {n: tensors[n].view_as(p) for n, p in encoder.named_parameters()}
        outputs = [torch.func.functional_call(encoder, shaped, (batch[key],)) for key in ("a", "b")]
        return nn.functional.cross_entropy(outputs[0] @ outputs[1].T, torch.arange(8))

    point = torch.cat([p.detach().reshape(-1) for p in encoder.parameters()])
    dense = torch.autograd.functional.hessian(loss_at, point)
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
