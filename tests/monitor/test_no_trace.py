"""Training with a monitor is bit for bit training without one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monitored_runs import MSE, X, Y, linear, start, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt
from stableopt import StabilityMonitor


class Noisy(nn.Module):
    """Draws from every generator, in training and in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        noisy = x * (1 + 0.1 * torch.rand_like(x)) + 0.01 * noise
        # Evaluation draws too, and uses nothing: samples have no curvature of their own under noise.
        return noisy if self.training else x


def restless() -> nn.Sequential:
    torch.manual_seed(1)
    frozen = nn.BatchNorm1d(4).eval()
    return nn.Sequential(
        nn.Linear(2, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        Noisy(),
        frozen,
        nn.Dropout(0.3),
        nn.Linear(4, 1),
    )


def snapshot(model: nn.Module, generator: torch.Generator) -> list[Any]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [
        *(None if t is None else t.detach().clone() for t in tensors),
        torch.get_rng_state(),
        generator.get_state(),
        torch.from_numpy(numpy[1].astype(np.int64)),
        (python, numpy[0], numpy[2:]),
        [module.training for module in model.modules()],
    ]


def equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def restless_run(
    watch: Callable[[torch.optim.Optimizer, nn.Module, Any], StabilityMonitor] | None,
    around: Callable[[], Any] = torch.no_grad,
) -> tuple[list[list[Any]], StabilityMonitor | None]:
    """Return snapshots after each step of two epochs; the training loader is also the probe."""
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    model, generator = restless(), torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = None
    if watch is not None:
        with pytest.warns(UserWarning, match="batch norm"):
            monitor = watch(optimizer, model, loader)
    shots = [snapshot(model, generator)]
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            MSE(model(x), y).backward()
            gradients = [p.grad for p in model.parameters()]
            before = [g.clone() for g in gradients if g is not None]
            with around():
                optimizer.step()
            # `is`: user code may hold on to a gradient, and so must the model.
            assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
            assert equal(before, [p.grad for p in model.parameters()])
            shots.append(snapshot(model, generator))
    return shots, monitor


@pytest.mark.parametrize(
    "around",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast"],
)
def test_monitor_leaves_no_trace(around: Callable[[], Any]) -> None:
    """Catches anything a measurement changes: weights, gradients, statistics, modes, random states.

    Dropout, batch norm and the loader make later steps depend on anything moved before.
    """

    def watch(optimizer: torch.optim.Optimizer, model: nn.Module, loader: Any) -> Any:
        quantities = ("sharpness", "non_uniformity", "realised_edge", "critical_sharpness")
        return StabilityMonitor(optimizer, model, MSE, loader, every=1, quantities=quantities)

    bare, _ = restless_run(None, around)
    watched, monitor = restless_run(watch, around)
    assert monitor is not None
    # As many measurements as steps, or there was nothing to leave a trace; two modes of 17.
    assert [(m.step, m.failure) for m in monitor.history] == [(k, None) for k in range(1, 7)]
    for index, (left, right) in enumerate(zip(bare, watched, strict=True)):
        assert equal(left, right), f"after step {index}"


def test_failing_measurement_leaves_no_trace() -> None:
    """Catches state that is not restored when the loss raises halfway through a measurement."""

    def watch(optimizer: torch.optim.Optimizer, model: nn.Module, loader: Any) -> Any:
        armed = calls = 0

        def loss(output: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += armed
            if calls > 1:  # after the first batch of the first measurement
                raise RuntimeError("out of luck")
            return MSE(output, y)

        monitor = StabilityMonitor(optimizer, model, loss, loader, every=1)
        armed = 1
        return monitor

    bare, _ = restless_run(None)
    with pytest.warns(RuntimeWarning, match="out of luck") as caught:
        watched, monitor = restless_run(watch)
    assert len([w for w in caught if "out of luck" in str(w.message)]) == 1
    assert monitor is not None
    assert [m.failure for m in monitor.history] == ["RuntimeError: out of luck"] * 6
    assert all(equal(left, right) for left, right in zip(bare, watched, strict=True))


def test_autocast_does_not_reach_the_measurement() -> None:
    """Catches curvature computed in bfloat16 because the step runs inside an autocast block."""
    values = []
    for enabled in (False, True):
        model, optimizer, monitor = start()
        MSE(model(X), Y).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        assert monitor.margins is not None
        values.append((monitor.margins.sharpness, monitor.margins.loss))
    assert values[0] == values[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_the_training_loader_are_not_disturbed() -> None:
    """Catches a probe that iterates the training loader itself, and so restarts its workers."""

    def run(watched: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(4)
        loader = DataLoader(
            TensorDataset(X, Y),
            batch_size=5,
            shuffle=True,
            generator=generator,
            num_workers=1,
            persistent_workers=True,
        )
        model = linear()
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        monitor = optimizer.track(model, MSE, loader, every=1) if watched else None
        batches = []
        for _ in range(2):
            for x, y in loader:
                batches.append(x)
                optimizer.zero_grad()
                MSE(model(x), y).backward()
                optimizer.step()
        measured = 0 if monitor is None else len([m for m in monitor.history if m.converged])
        return [*batches, model.weight.detach(), generator.get_state()], measured

    bare, watched = run(False), run(True)
    assert watched[1] == 6
    assert equal(bare[0], watched[0])


def test_parameter_hooks_do_not_fire() -> None:
    """Catches second-order passes through the user's own parameters instead of copies."""
    model, optimizer, monitor = start()
    calls: list[str] = []
    model.weight.register_hook(lambda gradient: calls.append("gradient"))
    model.weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    monitor.measure()
    assert calls == []
    train(model, optimizer)
    assert calls == ["gradient", "accumulated"]  # those of training


def test_batch_norm_is_warned_of_once() -> None:
    """Catches a warning at every measurement, and none at all."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="batch norm in training mode") as caught:
        monitored(model, optimizer, steps=3)
    assert len(caught) == 1


def monitored(model: nn.Module, optimizer: stableopt.SGD, steps: int) -> None:
    optimizer.track(model, MSE, (X, Y), every=1)
    train(model, optimizer, steps)


class Remembers(nn.Module):
    """Keeps a state of its own that enters its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.state = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) + 0.1 * self.state
        self.state = out.detach().mean(0)
        return out


class Averaging(nn.Module):
    """A loss with a running mean, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        loss = MSE(output, y) + 0.01 * self.mean
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss


@pytest.mark.parametrize(
    ("make_model", "make_loss"),
    [
        (Remembers, nn.MSELoss),
        (linear, Averaging),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), linear()), nn.MSELoss),
    ],
    ids=["state of the model", "state of the loss", "inputs in place"],
)
def test_states_and_inputs_are_left_alone(make_model: Any, make_loss: Any) -> None:
    """Catches attributes, buffers of the loss, or probe data that a measurement changes."""
    results = []
    for tracked in (False, True):
        torch.manual_seed(0)
        model, loss_fn, x = make_model(), make_loss(), X.clone()
        optimizer = stableopt.SGD(model.parameters(), lr=0.1)
        if tracked:
            monitor = optimizer.track(model, loss_fn, (x, Y), every=1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_fn(model(x.clone()), Y).backward()
            optimizer.step()
        results.append([*(p.detach() for p in model.parameters()), *loss_fn.buffers(), x])
    assert [m.failure for m in monitor.history] == [None] * 4
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
