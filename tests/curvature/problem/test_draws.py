"""Losses that draw random numbers: measured with one fixed draw, and reported by a warning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt.curvature import Hessian, NonUniformity, Problem
from stableopt.curvature.problem.data.draws import seed_of

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)).double()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 3, bias=False).double()


def denoising(draw: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: (model(x + 3 * draw(x)) - x).square().mean()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own_generator() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize(
    "make_draw", [lambda: torch.randn_like, own_generator], ids=["process", "own"]
)
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_sharpness_is_that_of_one_draw(make_draw: Any, chunk_size: int | None) -> None:
    """Catches a random loss refused as "not a mean over samples", a new draw in each product, and chunks
    that share their draw.
    """
    with pytest.warns(UserWarning, match="loss_fn draws random numbers: a measurement repeats one"):
        problem = Problem.from_batch_loss(
            linear(), denoising(make_draw()), X, chunk_size=chunk_size
        )
    noise = [
        torch.randn(chunk.shape, generator=generator(seed_of(chunk)), dtype=torch.float64)
        for chunk in X.split(chunk_size or 24)
    ]
    noisy_inputs = X + 3 * torch.cat(noise)
    expected = torch.kron(torch.eye(3).double(), 2 * noisy_inputs.T @ noisy_inputs / (3 * 24))
    hessian = Hessian(problem)
    eye = torch.eye(9).double()
    for _ in range(2):
        matrix = torch.stack([hessian @ row for row in eye])
        # A quadratic loss: both are sums of 24 products, up to rounding.
        assert torch.allclose(matrix, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_denoiser_that_starts_at_zero_is_random(chunk_size: int | None) -> None:
    """Catches a loss whose draw hardly matters at the start, such as the squared norm of much noise.

    It was not refused for samples when it mattered later, and refused as "not a mean" for some sizes.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 64)).double()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return (model(x + noise) - noise).square().mean()

    x = X.repeat(1, 22)[:, :64]
    with pytest.warns(UserWarning, match="a measurement repeats one draw of each chunk"):
        problem = Problem.from_batch_loss(model, loss, x, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="put the noise into the batch"):
        NonUniformity(problem)


def test_the_seed_of_a_part_of_a_batch() -> None:
    """Catches bytes that are read as words from an odd place, and a part with the seed of the whole."""
    batch = {
        "x": torch.arange(24, dtype=torch.uint8).view(8, 3),
        "mask": torch.ones(8).bool(),
        "k": 1,
    }
    parts = [{key: v[1:5] if key != "k" else v for key, v in batch.items()}, batch]
    assert len({seed_of(part) for part in parts}) == 2


def test_draws_that_change_nothing_are_not_noticed() -> None:
    """Catches a warning about a model that draws, as for layers to drop in training, and uses none."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        torch.rand(())
        return (model(x) - x).square().mean()

    NonUniformity(Problem.from_batch_loss(linear(), loss, X))


def test_samples_are_refused_with_the_way_out() -> None:
    """Catches a non-uniformity of noise that each batch shape draws differently."""
    with pytest.warns(UserWarning, match="loss_fn draws random numbers"):
        problem = Problem.from_batch_loss(linear(), denoising(torch.randn_like), X)
    with pytest.raises(ValueError, match="put the noise into the batch"):
        NonUniformity(problem)


def test_a_random_sum_is_still_refused() -> None:
    """Catches a sum that passes because it is random."""

    def total(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x + torch.randn_like(x)) - x).square().sum()

    with pytest.raises(ValueError, match=r"over 16 random draws .* expected the same"):
        Problem.from_batch_loss(linear(), total, X)


@pytest.mark.parametrize(
    "make_draw", [lambda: torch.randn_like, own_generator], ids=["process", "own"]
)
def test_training_draws_as_without_a_measurement(make_draw: Any) -> None:
    """Catches a measurement that advances a generator, including the loss's own."""

    def train(tracked: bool) -> list[float]:
        torch.manual_seed(2)
        model, draw = linear(), make_draw()
        loss = denoising(draw)
        optimizer = stableopt.SGD(model.parameters(), lr=0.01)
        if tracked:
            with pytest.warns(UserWarning, match="loss_fn draws random numbers"):
                optimizer.track(Problem.from_batch_loss(model, loss, X), every=1)
        torch.manual_seed(3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            value = loss(model, X)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        return losses

    assert train(tracked=False) == train(tracked=True)


@pytest.mark.filterwarnings("ignore:loss_fn draws")
def test_a_random_mean_near_zero_is_accepted() -> None:
    """Catches a ratio of two averages that are noise, as of a critic at its initialisation."""

    def critic_loss(model: nn.Module, x: Tensor) -> Tensor:
        loss: Tensor = model(torch.randn_like(x)).mean() - model(x).mean()
        return loss

    for seed in range(8):
        torch.manual_seed(seed)
        critic = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1)).double()
        Problem.from_batch_loss(critic, critic_loss, X)


@pytest.mark.filterwarnings("ignore:loss_fn draws")
def test_its_derivative_is_checked_in_double_precision() -> None:
    """Catches a check that single precision blurs, since the draws differ between the precisions.

    Contrastive divergence ignores that its samples depend on the model: 2 % of the slope here.
    """

    def divergence(model: nn.Module, x: Tensor) -> Tensor:
        walker = torch.randn_like(x)
        for _ in range(3):
            walker = walker.detach().requires_grad_()
            walker = walker - 0.1 * torch.autograd.grad(model(walker).sum(), walker)[0]
        low, high = model(x), model(walker.detach())
        return (low - high).mean() + (low.square() + high.square()).mean() / 10

    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
        with pytest.raises(ValueError, match="the gradient is not the derivative of the loss"):
            Problem.from_batch_loss(model, divergence, X.float())
