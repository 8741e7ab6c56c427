"""Steps beyond plain SGD: their preconditioner, the optimizer that applies it, and the curvature."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.training.data import Dataset, Images
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.minimum import Minimum, Start
from benchmarks.training.threshold import curvature_of
from benchmarks.training.update import FLOOR, SGD, Update


@pytest.fixture
def setting() -> tuple[nn.Module, Images]:
    """Return a network with few parameters, and a few digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10))
    return model, Dataset("digits", 6).load()


def test_adams_preconditioner(setting: tuple[nn.Module, Images]) -> None:
    """Catches squares of the mean gradient, and a step without P = 1/(sqrt v + epsilon); v by a loop."""
    model, images = setting
    update = Update(adaptive=True)
    params = list(model.parameters())
    samples = [
        torch.autograd.grad(mean_squared_error(model(x[None]), y[None]), params)
        for x, y in zip(images.x, images.y, strict=True)
    ]
    v = [torch.stack(each).square().mean(0) for each in zip(*samples, strict=True)]
    floor = FLOOR * torch.cat([each.flatten() for each in v]).mean().sqrt()
    gradient = torch.autograd.grad(mean_squared_error(model(images.x), images.y), params)
    expected = [
        p - 0.01 * g / (each.sqrt() + floor) for p, g, each in zip(params, gradient, v, strict=True)
    ]
    optimizer = update.optimizer(model, images, lr=0.01)
    mean_squared_error(model(images.x), images.y).backward()
    optimizer.step()
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


def test_curvature_is_the_preconditioned_one(setting: tuple[nn.Module, Images]) -> None:
    """Catches P^(1/2) instead of P; the oracle is lambda_max(P G), from dense Jacobians."""
    model, images = setting
    images = Images(images.x.double(), images.y.double(), images.test_x, images.test_labels)
    start = Start(Minimum("reached", 0, 0.0), model.double(), images)
    preconditioner = Update(adaptive=True).preconditioner(model, images)
    assert preconditioner is not None
    flat = torch.cat([torch.as_tensor(entry).flatten() for entry in preconditioner.entries])
    params = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, values, (images.x,)).flatten()

    parts = torch.func.jacrev(outputs)(params)
    rows = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    dense = 2 * rows.T @ rows / images.y.numel()
    for update, scale in ((SGD, torch.ones_like(flat)), (Update(adaptive=True), flat)):
        expected = torch.linalg.eigvals(scale[:, None] * dense).real.max()
        # The roots of P in the problem's coordinates are of the model's precision.
        assert curvature_of(start, update).sharpness == pytest.approx(float(expected), rel=1e-9)


def test_momentum_reaches_the_optimizer(setting: tuple[nn.Module, Images]) -> None:
    """Catches an optimizer whose momentum differs from the rule's, and a changed model."""
    model, images = setting
    before = copy.deepcopy(model.state_dict())
    optimizer = Update(momentum=0.9, nesterov=True).optimizer(model, images, lr=0.1)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, True)
    assert Update(momentum=0.9).rule(0.1).max_sharpness == pytest.approx(38.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
