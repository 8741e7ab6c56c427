"""SAM under a monitor: the limit of Long & Bartlett (2023), from the gradient before the ascent."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sam import SAM
from torch import Tensor, nn

from stableopt import FlightRecorder, StabilityMonitor, UpdateRule, measure
from stableopt.stability import readers

MSE = nn.MSELoss()

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(autouse=True)
def reader() -> None:
    UpdateRule.register(SAM, readers.sgd.read_sam)


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(60, 8)
    y = torch.tanh(x @ torch.randn(8, 1)) + 0.1 * torch.randn(60, 1)
    return nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 1)), x, y


def train(
    optimizer: Any, model: nn.Module, x: Tensor, y: Tensor, steps: int, form: str = "closure"
) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = MSE(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure()
            optimizer.second_step()


def test_sam_trains_at_its_own_edge() -> None:
    """Catches the limit 2/η, twice what full-batch SAM reaches, and more.

    At the edge of stability the ratio oscillates around 1, here between 0.99 and 1.06.
    """
    model, x, y = setting()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.2)
    with StabilityMonitor(
        optimizer, model, MSE, (x, y), every=50, quantities=["sharpness"]
    ) as monitor:
        train(optimizer, model, x, y, 1000)
    late = list(monitor.history)[10:]
    assert all(0.95 < m.sharpness / m.sharpness_limit < 1.1 for m in late)
    assert all(m.sharpness < 0.45 * 2 / 0.2 for m in late)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_norm_is_that_before_the_ascent(momentum: float) -> None:
    """Catches the norm after the ascent, one read once only, and a rule without the momentum."""
    model, x, y = setting()
    options = {"lr": 0.05, "momentum": momentum}
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, **options)
    expected = []
    with StabilityMonitor(optimizer, model, MSE, (x, y), every=1) as monitor:
        for _ in range(3):
            copied = copy.deepcopy(model)  # the monitor counts the samples of passes of the model
            gradients = torch.autograd.grad(MSE(copied(x), y), list(copied.parameters()))
            norm = float(torch.cat([g.flatten() for g in gradients]).norm())
            expected.append(UpdateRule(**options, ascent=0.3 / norm).max_sharpness)
            train(optimizer, model, x, y, 1)
    limits = [m.sharpness_limit for m in monitor.history]
    assert limits == pytest.approx(expected, rel=1e-5)
    assert len({round(limit, 3) for limit in limits}) == 3


def test_both_forms_of_its_step_have_the_same_margins() -> None:
    """Catches a norm that only one of the forms reads."""
    histories = []
    for form in ("closure", "two calls"):
        model, x, y = setting()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        with StabilityMonitor(optimizer, model, MSE, (x, y), every=1) as monitor:
            train(optimizer, model, x, y, 3, form)
        histories.append([(m.sharpness, m.sharpness_limit) for m in monitor.history])
    assert histories[0] == histories[1]
    assert None not in histories[0][0]


def test_the_class_of_a_package() -> None:
    """Catches a reader that knows only classes of its own tests."""
    kinds = pytest.importorskip("pytorch_optimizer", reason="needs pytorch_optimizer")
    limits = []
    for kind in (kinds.SAM, SAM):
        model, x, y = setting()
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, weight_decay=0.01)
        with StabilityMonitor(optimizer, model, MSE, (x, y), every=1) as monitor:
            train(optimizer, model, x, y, 2)
        limits.append([m.sharpness_limit for m in monitor.history])
    assert limits[0] == pytest.approx(limits[1], rel=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: SAM(p, torch.optim.SGD, rho=0.1, adaptive=True, lr=0.1), "adaptive SAM"),
        (lambda p: SAM(p, torch.optim.Adam, rho=0.1, lr=0.1), "anything but SGD"),
        (lambda p: SAM(p, torch.optim.Rprop, rho=0.1, lr=0.1), "Rprop"),
    ],
)
def test_other_kinds_of_sam_have_no_limit(make: Callable[[Any], Any], reason: str) -> None:
    """Catches the limit of SAM over plain SGD, and training that fails."""
    model, x, y = setting()
    optimizer = make(model.parameters())
    with pytest.warns(RuntimeWarning, match=reason):
        monitor = StabilityMonitor(optimizer, model, MSE, (x, y), every=1)
    with monitor:
        train(optimizer, model, x, y, 2)
    assert reason in str(monitor.update_rule.unknown)
    assert monitor.margins is not None
    assert monitor.margins.sharpness_limit is None
    assert monitor.margins.realised_edge is not None


def test_without_an_observed_step_the_limit_is_not_known() -> None:
    """Catches a limit of a copy, of a step that no monitor observed, or from a gradient of zero."""
    model, x, y = setting()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    train(optimizer, model, x, y, 1)
    with pytest.warns(RuntimeWarning, match=r"a StabilityMonitor observes it.*ascent=rho / norm"):
        assert measure(model, MSE, (x, y), optimizer=optimizer).sharpness_limit is None
    with StabilityMonitor(optimizer, model, MSE, (x, y), every=1) as monitor:
        assert monitor.measure().sharpness_limit is None
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.first_step()
        assert monitor.update_rule.unknown is not None
        train(optimizer, model, x, y, 1)
        assert monitor.update_rule.ascent > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure(model, MSE, (x, y), optimizer=optimizer).sharpness_limit is not None


@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_the_recorder_takes_the_gradient_before_the_ascent(form: str, tmp_path: Any) -> None:
    """Catches the gradient at the ascended point, and its loss as that of the next step."""
    model, x, y = setting()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=2.0, lr=0.05)
    monitor = StabilityMonitor(optimizer, model, MSE, (x, y), every=10**6)
    recorder, expected = FlightRecorder(monitor, tmp_path), []

    def closure(report: bool = True) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = MSE(model(x), y)
        loss.backward()
        if report:
            recorder.loss(loss)
        return loss

    for _ in range(3):
        loss = closure()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        expected.append((float(loss.detach()), float(norm)))
        if form == "closure":
            optimizer.step(closure)
        else:
            optimizer.first_step()
            closure(report=False)
            optimizer.second_step()
    recorder.close()
    monitor.close()
    recorded = [(step.loss, step.grad_norm) for step in recorder.evidence.steps]
    for numbers, right in zip(recorded, expected, strict=True):
        assert numbers == pytest.approx(right, rel=1e-5)
