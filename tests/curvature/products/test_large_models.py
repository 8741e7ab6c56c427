"""Products of large models hold fewer copies of the parameters, and have the same numbers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from peak_memory import EAGER_RETURN, STATUS, peak_mib, peak_of_process
from torch import Tensor, nn

import stableopt
from stableopt.curvature import GaussNewton, Hessian, Problem
from stableopt.curvature.problem import cost, differentiable_loss

EXACT = 1e-12
"""Rounding of sums of a few terms in float64, in another order."""


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every model as a large one."""
    monkeypatch.setattr(differentiable_loss, "LARGE", 0)


def tied() -> nn.Module:
    """Return a model with a weight of two uses, sparse gradients and a parameter that is unused."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(7, 3), nn.Linear(3, 3)
            self.codes = nn.Embedding(7, 3, sparse=True)
            self.unused = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.mix(self.words(x) * self.codes(x)))
            return hidden @ self.words.weight.T

    return Tied().double()


def tied_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(7, (5,), generator=generator) for _ in range(2))
    return x, y


def test_products_and_gradient_are_those_of_small_models(
    request: pytest.FixtureRequest,
) -> None:
    """Catches a part that is added twice, left out, or not scaled, over chunks of several sizes."""

    def products() -> list[Tensor]:
        model, loss = tied(), nn.CrossEntropyLoss()
        problem = Problem(model, loss, tied_data(), chunk_size=2).transformed(
            sign=-1.0,
            scale=[torch.linspace(1, 2, p.numel()).view_as(p).double() for p in model.parameters()],
            weight_decay=[0.1] * 5,
        )
        hessian = Hessian(problem, gradient=True, lasting=False)
        images = hessian @ torch.eye(problem.num_params).double()
        assert hessian.gradient is not None
        gauss_newton = GaussNewton(problem) @ torch.eye(problem.num_params).double()
        return [images, gauss_newton, hessian.gradient, problem.gradient()]

    expected = products()
    request.getfixturevalue("large")
    for actual, exact in zip(products(), expected, strict=True):
        assert relative_error(actual, exact) < EXACT


class Writes(nn.Module):
    """A layer that clamps its weight in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, 3.0]]).double())

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(max=1.0)
        return torch.tanh(x @ self.weight.T)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("layer", [Writes, lambda: nn.Linear(2, 1).double()])
def test_a_measurement_leaves_the_parameters_as_they_are(layer: type[nn.Module]) -> None:
    """Catches a pass that lets a model write to the parameters' own memory."""
    model = layer()
    x, y = torch.ones(3, 2).double(), torch.zeros(3, 1).double()
    before = [p.detach().clone() for p in model.parameters()]
    problem = Problem(model, nn.MSELoss(), (x, y))
    stableopt.measure(problem, tol=0.1)
    problem.gradient()
    assert all(map(torch.equal, before, model.parameters()))
    shared = problem.theta(lasting=False)[0].data_ptr() == next(model.parameters()).data_ptr()
    assert shared == isinstance(model, nn.Linear)


@pytest.mark.usefixtures("large")
def test_an_operator_of_the_public_stays_as_training_goes_on() -> None:
    """Catches a Hessian that shares memory with the parameters without being asked to."""
    model = nn.Linear(2, 1).double()
    x, y = torch.ones(3, 2).double(), torch.zeros(3, 1).double()
    problem = Problem(model, lambda z, y: (z - y).pow(4).mean(), (x, y))
    hessian, vector = Hessian(problem), torch.ones(3).double()
    before = hessian @ vector
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(hessian @ vector, before)


def peak() -> float:
    """Return by how many copies of the parameters a measurement raises the process's peak memory."""
    torch.set_num_threads(1)
    differentiable_loss.LARGE = 0
    evaluation: Any = importlib.import_module("stableopt.stability.measure.evaluation")
    evaluation.vectors_held = lambda *_: cost._FEWEST_VECTORS
    for width in (8, 500):  # the first run sets up torch
        torch.manual_seed(0)
        layers = [layer for _ in range(10) for layer in (nn.Linear(width, width), nn.Tanh())]
        model, x = nn.Sequential(*layers), torch.randn(2, width)
        before = peak_mib()
        stableopt.measure(model, nn.MSELoss(), (x, torch.zeros(2, width)), tol=1e-9, max_iter=8)
    model_mib = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    return (peak_mib() - before) / model_mib


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_few_copies_of_the_parameters_are_held() -> None:
    """Catches another copy of all parameters: a search holds six vectors, and makes one more.

    Measured: 10.1 copies, including the model; 13.1 with copies of parameters and gradient.
    """
    code = "from test_large_models import peak; print(peak())"
    assert peak_of_process(code, Path(__file__).parent, **EAGER_RETURN) < 11


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_rounded_starts_take_as_few_products(
    optimizer: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a warm start whose rounding costs products."""
    evaluation: Any = importlib.import_module("stableopt.stability.measure.evaluation")
    monkeypatch.setattr(evaluation, "vectors_held", lambda *_: cost._FEWEST_VECTORS)

    def tracked() -> tuple[list[int], stableopt.StabilityMonitor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
        x, y = torch.randn(50, 20), torch.randn(50, 1)
        stepped = optimizer(model.parameters(), lr=1e-4)
        monitor = stableopt.StabilityMonitor(stepped, model, nn.MSELoss(), (x, y), every=1)
        for _ in range(3):
            nn.MSELoss()(model(x), y).backward()
            stepped.step()
            stepped.zero_grad()
        measurements = [m for margins in monitor.history for m in margins.measurements.values()]
        return [m.products for m in measurements], monitor

    products, monitor = tracked()
    assert {rows.dtype for rows in monitor.state_dict()["starts"].values()} == {torch.bfloat16}
    assert {vector.dtype for vector in monitor.eigenvectors.values()} == {torch.float32}
    monkeypatch.setattr(evaluation, "WARM_START_DTYPE", torch.float32)
    exact, monitor = tracked()
    assert {rows.dtype for rows in monitor.state_dict()["starts"].values()} == {torch.float32}
    assert sum(products) <= sum(exact)
    assert products[-1] < products[0]
