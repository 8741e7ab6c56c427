"""Optimizers without torch's step hooks."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from monitored_runs import MSE, X, Y
from sam import SAM
from torch import nn

from stableopt import StabilityMonitor, critical_sharpness


class Wrapper:
    """Groups and steps of an optimizer, without its hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self, closure: Any = None) -> str:
        self.inner.step(closure)
        return "stepped"


class Delegating:
    """A wrapper whose ``step`` is that of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Uninitialised(torch.optim.Optimizer):
    """A subclass that never ran torch's initialisation."""

    def __init__(self, params: Any, lr: float) -> None:
        self.param_groups = [{"params": list(params), "lr": lr}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> str:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return "stepped"


def made(kind: Any, params: Any) -> Any:
    if kind is Uninitialised:
        return kind(params, 0.1)
    return kind(torch.optim.SGD(params, lr=0.1))


def train(optimizer: Any, model: nn.Module, steps: int = 3) -> list[Any]:
    results = []
    for _ in range(steps):
        optimizer.zero_grad()
        MSE(model(X), Y).backward()
        results.append(optimizer.step())
    return results


@pytest.mark.parametrize("kind", [Wrapper, Delegating, Uninitialised])
def test_it_is_measured_and_left_as_it_was(kind: Any) -> None:
    """Catches a wrapper that is refused, steps counted twice, and traces of a closed monitor.

    The oracle is the optimizer inside, with its hooks.
    """
    runs = []
    for bare in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = plain if bare else made(kind, model.parameters())
        before = dict(vars(optimizer))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # limits that are not known
            monitor = StabilityMonitor(
                optimizer,
                model,
                MSE,
                (X, Y),
                every=1,
                batch_size=len(X),
                quantities=("sharpness", "realised_edge"),
            )
        results = train(optimizer, model)
        runs.append([(m.step, m.sharpness, m.realised_edge) for m in monitor.history])
        if not bare:
            assert results == [None if kind is Delegating else "stepped"] * 3
            critical = critical_sharpness(model, MSE, (X, Y), optimizer=optimizer)
            assert critical.passes <= 7
            if kind is not Uninitialised:  # torch makes no copies of it
                for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                    train_alone(copied)
            assert monitor.step == 3
            monitor.close()
            assert vars(optimizer) == before
            train(optimizer, model)
            assert monitor.step == 3
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3


def train_alone(optimizer: Any) -> None:
    """Take a step with a copied optimizer, on the copy's parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.allclose(p, b - 0.1) for p, b in zip(params, before, strict=True))


def test_a_wrapper_put_around_it_later_stays() -> None:
    """Catches closing that removes a scheduler's wrapper of ``step``, or leaves hooks active."""
    model = nn.Linear(2, 1)
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first, second = (StabilityMonitor(optimizer, model, MSE, (X, Y), every=1) for _ in range(2))
    first.close()
    train(optimizer, model, 2)
    assert (first.step, second.step) == (0, 2)
    second.close()
    train(optimizer, model, 1)
    assert (first.step, second.step) == (0, 2)


def scheduled_after_the_monitor() -> tuple[nn.Module, Any, StabilityMonitor]:
    """Return a model, its optimizer without step hooks, and a monitor that is older than a scheduler."""
    model = nn.Linear(2, 1)
    optimizer: Any = Uninitialised(model.parameters(), 0.1)
    optimizer.defaults = {}
    monitor = StabilityMonitor(optimizer, model, MSE, (X, Y), every=1)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    return model, optimizer, monitor


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
def test_a_scheduler_made_after_the_monitor_leaves_it_its_steps() -> None:
    """Catches a scheduler that wraps the function of ``step`` inside the observation, which ends it."""
    model, optimizer, monitor = scheduled_after_the_monitor()
    assert train(optimizer, model) == ["stepped"] * 3
    assert monitor.step == 3


@pytest.mark.filterwarnings("ignore:limits are not known:RuntimeWarning")
def test_a_scheduler_does_not_keep_a_closed_monitor() -> None:
    """Catches the probe data of a closed monitor that live as long as the scheduler's wrapper."""
    model, optimizer, monitor = scheduled_after_the_monitor()
    monitor.close()
    left = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert left() is None
    assert train(optimizer, model) == ["stepped"] * 3


def test_a_monitor_of_a_hook_outlives_a_scheduler_that_follows() -> None:
    """Catches hooks that wait for the next step, and are lost where a scheduler wraps it first."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitors: list[StabilityMonitor] = []

    def track(*_: Any) -> None:
        if not monitors:
            monitors.append(StabilityMonitor(optimizer, model, MSE, (X, Y), every=1))

    optimizer.register_step_post_hook(track)
    train(optimizer, model, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        train(optimizer, model, 1)
        scheduler.step()  # warns if it does not see the step
    assert (monitors[0].step, len(monitors[0].history)) == (3, 3)


class Fixed(Wrapper):
    """A wrapper that refuses attributes."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "inner":
            raise AttributeError(f"no attribute {name}")
        super().__setattr__(name, value)


def test_what_cannot_be_observed_is_refused() -> None:
    """Catches a monitor that never measures, and a hook left in the model."""
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(TypeError, match=r"Fixed has no step hooks.*pass the torch.optim"):
            StabilityMonitor(Fixed(sgd), model, MSE, (X, Y), every=1)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_a_step_in_parts_is_one_step(form: str) -> None:
    """Catches a monitor that never measures, measures twice, or at the wrong weights.

    Also catches a batch size that counts both gradients of a step.
    """
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its limits are not known
        monitor = StabilityMonitor(
            optimizer, model, MSE, (X, Y), every=1, quantities=("sharpness", "realised_edge")
        )
    losses, edges = [], []
    for rows in (slice(0, 8), slice(4, 12), slice(2, 10)):

        def gradients(rows: slice = rows) -> None:
            MSE(model(X[rows]), Y[rows]).backward()

        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        gradients()
        if form == "closure":
            optimizer.step(gradients)
        else:
            optimizer.first_step()
            gradients()
            optimizer.second_step()
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        full = torch.cat([X, torch.ones(len(X), 1)], dim=1)
        hessian = 2 * full.T @ full / len(X)
        gradient = hessian @ before - 2 * full.T @ Y.squeeze(1) / len(X)
        edges.append(float(-0.5 * (moved @ hessian @ moved) / (gradient @ moved)))
        with torch.no_grad():
            losses.append(float(MSE(model(X), Y)))
    assert [m.step for m in monitor.history] == [1, 2, 3]
    assert monitor.batch_size == 8
    torch.testing.assert_close([m.loss for m in monitor.history], losses)
    monitor.close()
    assert "first_step" not in vars(optimizer)
    assert "second_step" not in vars(optimizer)
    measured = monitor.history[0].realised_edge
    assert measured == pytest.approx(edges[0], rel=1e-4)
