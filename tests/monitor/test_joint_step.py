"""Several optimizers that take one joint step, and steps that call other steps."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from first_order import Unread
from monitored_runs import MSE, X, Y
from torch import nn

from stableopt import StabilityMonitor, UpdateRule, measure
from stableopt.monitor.joint_step import JointStep


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def halves(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    slow = torch.optim.SGD(model[0].parameters(), lr=0.1)
    return slow, torch.optim.Adam(model[2].parameters(), lr=0.01)


def loss_of(model: nn.Module) -> torch.Tensor:
    return MSE(model(X.double()), Y.double())


def test_the_order_of_steps() -> None:
    """Catches a step that ends before all have stepped, or never ends after one was skipped."""
    a, b = halves(network())
    step = JointStep([a, b])
    for order, ends in (("ab", [2]), ("ba", [2]), ("aab", [3]), ("aba", [2]), ("abab", [2, 4])):
        step = JointStep([a, b])
        ended = []
        for index, name in enumerate(order, 1):
            optimizer = {"a": a, "b": b}[name]
            # Parameters are copied again where an optimizer steps twice.
            first = index == 1 or index - 1 in ends or order[index - 2 : index] == name * 2
            assert step.begins(optimizer) == first
            if step.ends(optimizer):
                ended.append(index)
        assert ended == ends


def test_a_joint_step_is_one_step_from_its_beginning() -> None:
    """Catches the realised edge of the last optimizer alone, and a step counted for each optimizer.

    The oracle is one optimizer with the same rates by groups.
    """
    together = []
    for split in (False, True):
        model = network()
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.2},
            {"params": list(model[2].parameters()), "lr": 0.1},
        ]
        optimizers: list[Any] = [torch.optim.SGD([g] if split else groups) for g in groups]
        optimizers = optimizers if split else optimizers[:1]
        monitor = StabilityMonitor(
            optimizers,
            model,
            MSE,
            (X.double(), Y.double()),
            every=2,
            quantities=("sharpness", "realised_edge"),
            tol=1e-9,
            realised_window=1,
        )
        for _ in range(4):
            model.zero_grad()
            loss_of(model).backward()
            for optimizer in optimizers:
                optimizer.step()
        assert [m.step for m in monitor.history] == [2, 4]
        assert monitor.step == 4
        together.append(monitor.margins)
        monitor.close()
        assert not any(o._optimizer_step_pre_hooks for o in optimizers)
        assert not any(o._optimizer_step_post_hooks for o in optimizers)
    first, second = together
    assert second.realised_edge == pytest.approx(first.realised_edge, rel=1e-12)
    assert second.preconditioned_sharpness == pytest.approx(
        first.preconditioned_sharpness, rel=1e-9
    )
    assert second.preconditioned_sharpness_limit == first.preconditioned_sharpness_limit == 10.0


def test_a_gradient_scaler_that_skips_one_of_them() -> None:
    """Catches a joint step that spans two iterations because one optimizer was skipped in the first."""
    model = network()
    a, b = halves(model)
    with pytest.warns(RuntimeWarning, match="momenta differ"):
        monitor = StabilityMonitor([a, b], model, MSE, (X.double(), Y.double()), every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    befores = []
    for iteration in range(3):
        a.zero_grad()
        b.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if iteration == 1:
            model[2].weight.grad.fill_(torch.inf)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(a)
        scaler.step(b)
        scaler.update()
        if iteration != 1:
            befores.append(before)
    assert [m.step for m in monitor.history] == [1, 2]
    # The slope of the last step alone: g^T delta at the parameters before it.
    for p, before in zip(model.parameters(), befores[-1], strict=True):
        p.data, before = before, p.data.clone()
        p.grad, p.after = None, before
    loss_of(model).backward()
    slope = sum(float((p.grad * (p.after - p.detach())).sum()) for p in model.parameters())
    assert monitor._measurer.memory["realised_edge"][-1][1] == pytest.approx(slope, rel=1e-9)


def test_blocks_have_ratios_of_their_own() -> None:
    """Catches a block measured in the coordinates, or against the limit, of another.

    The oracle measures each block alone, by params=.
    """
    model = network()
    a, b = halves(model)
    with pytest.warns(RuntimeWarning, match="momenta differ"):
        monitor = StabilityMonitor([a, b], model, MSE, (X.double(), Y.double()), every=1, tol=1e-9)
    loss_of(model).backward()
    a.step()
    b.step()
    assert monitor.margins is not None
    block_edge = monitor.margins["block_edge"]
    for part, optimizer, name in ((model[0], a, "SGD"), (model[2], b, "Adam")):
        alone = measure(
            model,
            MSE,
            (X.double(), Y.double()),
            optimizer=optimizer,
            params=list(part.parameters()),
            tol=1e-9,
        )
        # Eigenvalues to a residual of 1e-9.
        assert block_edge.details[name] == pytest.approx(alone.edge_ratio, rel=1e-9)
    assert block_edge.value == max(block_edge.details.values())
    assert monitor.margins.sharpness is not None
    assert monitor.margins.sharpness_limit is None
    assert monitor.margins.edge_ratio is None


@pytest.mark.parametrize("weight_decay", [2.0, 3.0])
def test_a_block_whose_decay_flips_signs_is_beyond_its_edge(weight_decay: float) -> None:
    """Catches a division by a limit of zero, and a ratio to a negative limit, which looks stable."""
    model = network()
    a = torch.optim.AdamW(model[0].parameters(), lr=1.0, weight_decay=weight_decay)
    b = torch.optim.SGD(model[2].parameters(), lr=0.01)
    loss_of(model).backward()
    a.step()
    b.step()
    with pytest.warns(RuntimeWarning, match="momenta differ"):
        margins = measure(model, MSE, (X.double(), Y.double()), optimizer=[a, b])
    assert margins["block_edge"].details["AdamW"] == math.inf
    assert margins["block_edge"].value == math.inf


def test_the_advice_for_muon_with_adamw_works() -> None:
    """Catches a warning that recommends a quantity that the monitor refuses."""
    model, data = network(), (X.double(), Y.double())
    muon = torch.optim.Muon([model[0].weight], lr=0.01)
    adamw = torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=0.01)
    advice = (
        r"generalised_sharpness of its parameters alone, .* of Muon and params=, or realised_edge"
    )
    with pytest.warns(RuntimeWarning, match=advice):
        StabilityMonitor([muon, adamw], model, MSE, data).close()
    alone = {"quantities": ["generalised_sharpness"], "params": [model[0].weight]}
    with pytest.warns(RuntimeWarning, match="Muon takes steps of a length"):
        StabilityMonitor(muon, model, MSE, data, **alone).close()
    both = StabilityMonitor([muon, adamw], model, MSE, data, every=1, quantities=["realised_edge"])
    loss_of(model).backward()
    muon.step()
    adamw.step()
    assert both.margins.failure is None
    assert both.margins["realised_edge"].details


def test_a_step_inside_of_a_step_is_one() -> None:
    """Catches a step counted twice where a subclass calls its parent's, also after an exception."""
    model = network()
    optimizer = Unread(model.parameters(), lr=0.1)
    torch.optim.SGD([torch.zeros(1)])  # whose own step has hooks from now on
    with pytest.warns(RuntimeWarning, match="limits are not known"):
        monitor = StabilityMonitor(optimizer, model, MSE, (X.double(), Y.double()), every=1)

    def broken() -> None:
        raise KeyError("closure")

    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        with pytest.raises(KeyError):
            optimizer.step(broken)
    assert [m.step for m in monitor.history] == [1, 2]
    assert all(m.realised_edge is not None for m in monitor.history)


def test_what_is_no_optimizer_is_named() -> None:
    """Catches errors that name neither the argument nor a remedy."""
    model = network()
    a, b = halves(model)
    for wrong in ([], "SGD", [a, "Adam"], None, {a}):
        with pytest.raises(TypeError, match=r"(?s)optimizer=.*expected a torch\.optim\.Optimizer"):
            StabilityMonitor(wrong, model, MSE, (X.double(), Y.double()))
    with pytest.raises(ValueError, match=r"optimizer=\[SGD, SGD\]: 2 parameters are held by more"):
        UpdateRule.of([a, torch.optim.SGD(model[0].parameters())])
    with pytest.raises(ValueError, match="trainable but not in the optimizer"):
        StabilityMonitor([a], model, MSE, (X.double(), Y.double()))
    up = torch.optim.Adam(model[2].parameters(), maximize=True)
    with pytest.raises(ValueError, match="some of them maximize"):
        UpdateRule.of([a, up])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UpdateRule.of([a])  # of a list of one is not the deprecated name
    assert len(UpdateRule.of([b, a]).blocks) == 2
