"""SGD with schedulers, gradient scalers, a compiler and closures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sgd_runs import X, Y, backward, network, same, track, weights
from torch import Tensor, nn
from torch.optim import lr_scheduler

import stableopt

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.7)],
        milestones=[3],
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_and_its_limits(name: str) -> None:
    """Catches limits computed from the learning rate (or momentum) that training began with."""

    def run(kind: Any) -> tuple[list[Tensor], list[tuple[float, float]], Any]:
        model = network()
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        # Before the scheduler, which wraps `step` on the instance.
        monitor = track(optimizer, model) if kind is stableopt.SGD else None
        scheduler = SCHEDULERS[name](optimizer)
        used = []
        for step in range(6):
            used.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
            optimizer.zero_grad()
            loss = backward(model, step)
            optimizer.step()
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        return weights(model), used, monitor

    ours, used, monitor = run(stableopt.SGD)
    reference, expected, _ = run(torch.optim.SGD)
    assert same(ours, reference)
    assert used == expected
    assert len(set(used)) > 1
    assert [m.lr for m in monitor.history] == [lr for lr, _ in used]
    # Two divisions and a product of exactly the same numbers: a few units in the last place.
    assert [m.sharpness_limit for m in monitor.history] == pytest.approx(
        [2 * (1 + momentum) / lr for lr, momentum in used], rel=1e-15 * 8
    )


def scaled_run(
    kind: Any, *, fused: bool, overflow_at: set[int], tracked: bool = False, explicit: bool = False
) -> tuple[list[Tensor], Any]:
    """Train with a scaler on the CPU; steps in ``overflow_at`` are extra, and are skipped."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    # A step that is never called leaves its samples to the next, so the batch size is given.
    monitor = track(optimizer, model, batch_size=len(X)) if tracked else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for step in range(4):
        for overflow in (True, False) if step in overflow_at else (False,):
            optimizer.zero_grad()
            scale = torch.tensor(float("inf")) if overflow else 1.0
            loss = nn.functional.mse_loss(model(X), Y)
            scaler.scale(loss * scale).backward()
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return weights(model) + buffers, monitor


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("explicit", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("overflow_at", [set(), {0}, {2}, {0, 2}], ids=str)
def test_step_that_a_scaler_skips_never_was(
    fused: bool, explicit: bool, overflow_at: set[int]
) -> None:
    """Catches momentum buffers left uninitialised by a skipped first step, as in torch 2.13's fused SGD.

    The scale halves with each overflow, which is exact in binary: the rest must be bit for bit.
    """
    # Uninitialised memory holds what the allocator left there: make it NaN, so that its use shows.
    spoiled = [torch.full(p.shape, float("nan")) for p in network().parameters()]
    del spoiled
    run = scaled_run(stableopt.SGD, fused=fused, explicit=explicit, overflow_at=overflow_at)
    clean = scaled_run(stableopt.SGD, fused=fused, explicit=explicit, overflow_at=set())
    assert same(run[0], clean[0])
    # Torch itself is the oracle wherever it has buffers, or needs none of the kernel's.
    oracle = scaled_run(torch.optim.SGD, fused=fused, explicit=explicit, overflow_at=set())
    assert same(clean[0], oracle[0])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_step_that_a_scaler_skips_is_not_measured(fused: bool) -> None:
    """Catches a measurement of a skipped step: fused steps call the hooks nevertheless."""
    run, monitor = scaled_run(stableopt.SGD, fused=fused, overflow_at={0, 2}, tracked=True)
    untracked, _ = scaled_run(stableopt.SGD, fused=fused, overflow_at={0, 2})
    assert same(run, untracked)
    assert len(monitor.history) == 4
    # A fused step that is skipped counts as a step, one that is never called cannot.
    assert [m.step for m in monitor.history] == ([2, 3, 5, 6] if fused else [1, 2, 3, 4])


@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_compiled_step(tracked: bool) -> None:
    """Catches a step, or a hook, that the compiler cannot trace or runs at compile time only."""
    model, other = network(), network()
    optimizer = stableopt.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reference = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    monitor = track(optimizer, model, every=2) if tracked else None
    # The eager backend: the graph is what tracing is about, code generation is torch's own.
    step = torch.compile(optimizer.step, backend="eager")
    its_step = torch.compile(reference.step, backend="eager")
    for index in range(5):
        for each, net, go in ((optimizer, model, step), (reference, other, its_step)):
            each.zero_grad()
            backward(net, index)
            go()
        assert same(weights(model), weights(other))
    torch._dynamo.reset()
    if monitor is not None:
        assert [(m.step, m.failure, m.batch_size) for m in monitor.history] == [
            (2, None, 3),
            (4, None, 3),
        ]


def test_step_with_a_closure() -> None:
    """Catches a closure not called, called twice or without gradients, and a loss not returned."""

    def run(kind: Any) -> tuple[list[Tensor], list[Tensor], int]:
        model = network()
        optimizer = kind(model.parameters(), lr=0.05, momentum=0.9)
        if kind is stableopt.SGD:
            track(optimizer, model)
        calls = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            return backward(model, len(calls))

        with torch.no_grad():
            losses = [optimizer.step(closure) for _ in range(3)]
        assert calls == [True] * 3
        if kind is stableopt.SGD:
            assert [m.batch_size for m in optimizer.monitor.history] == [3] * 3
        return weights(model), losses, len(calls)

    ours, reference = run(stableopt.SGD), run(torch.optim.SGD)
    assert same(ours[0], reference[0])
    assert same(ours[1], reference[1])
