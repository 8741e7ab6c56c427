"""Estimates of a measurement's cost."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from stableopt.curvature import Hessian, Problem, top_eigenpair
from stableopt.curvature.problem.cost import vectors_held


class Attention(nn.Module):
    """Attention over eight positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 8, 16)).chunk(3, dim=-1)
        return self.out((torch.softmax(q @ k.mT / 4, -1) @ v).flatten(1))


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(128, 30), nn.Tanh(), nn.Linear(30, 4)),
    "convolution": lambda: nn.Sequential(
        OrderedDict(
            shape=nn.Unflatten(1, (2, 8, 8)),
            first=nn.Conv2d(2, 6, 3),
            act=nn.GELU(),
            flat=nn.Flatten(),
            last=nn.Linear(216, 4),
        )
    ),
    "attention": Attention,
}


def problem_of(model: nn.Module, **options: object) -> Problem:
    torch.manual_seed(0)
    data = torch.randn(12, 128), torch.randint(4, (12,))
    return Problem(model, nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tol", [0.03, 1e-3])
def test_the_products_of_a_search_are_estimated_to_a_factor_of_two(name: str, tol: float) -> None:
    """Catches counts that drift from the eigen-solver's."""
    torch.manual_seed(0)
    problem = problem_of(MODELS[name]())
    expected = problem.cost(tol=tol)["sharpness"].products
    products = top_eigenpair(Hessian(problem), tol=tol).products
    assert expected / 2 <= products <= 2 * expected


def test_counts_follow_from_sizes_and_times_from_one_gradient() -> None:
    """Catches a cost without the vectors, the cache, or the samples that were not timed."""
    torch.manual_seed(0)
    model = nn.Linear(128, 4)
    cost = problem_of(model).cost(tol=1e-3)
    sharpness, gradient = cost["sharpness"], cost["gradient"]
    assert (sharpness.products, sharpness.gradients) == (22, 45.5)
    assert sharpness.seconds == 45.5 * gradient.seconds > 0
    assert cost["preconditioned_sharpness"] == sharpness
    assert cost["realised_edge"].gradients < cost["critical_sharpness"].gradients < 8
    vectors = 26 * 4 * 516
    assert sharpness.bytes > vectors
    assert vectors_held(10**8, 4) == 6


def test_a_large_search_restarts_and_computes_its_passes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches the costs of a small model for a large one."""
    monkeypatch.setattr("stableopt.curvature.problem.cost.CACHE", 1000)
    sharpness = problem_of(nn.Linear(128, 4)).cost(tol=1e-3)["sharpness"]
    assert (sharpness.products, sharpness.gradients) == (33, 99)


def test_asking_leaves_no_trace_and_checks_no_second_derivative() -> None:
    """Catches gradients left behind, a generator that moves on, and a check that was put off."""
    model = nn.Sequential(nn.Linear(128, 4), nn.Dropout())
    problem = problem_of(model, second_derivatives=False)
    state = torch.get_rng_state()
    problem.cost()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert not problem._facts.checked_twice
    with pytest.raises(ValueError, match="tol=0"):
        problem.cost(tol=0)
