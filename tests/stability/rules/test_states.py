"""Preconditioners from optimizer states: empty, copied, loaded, reordered and partial ones."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch_optimizer
from optimizer_steps import KINDS, MSE, Data, dense, take, top
from oracles import dense_hessians
from torch import nn

from stableopt import UpdateRule, measure
from stableopt.stability import (
    DiagonalPreconditioner,
    UnknownPreconditioner,
)


@pytest.mark.parametrize("kind", KINDS)
def test_before_its_first_step_nothing_is_known_and_said_to_be(
    kind: str, network: nn.Module, data: Data
) -> None:
    """Catches 1/eps, or an accumulator's start, taken for the preconditioner of a step not taken."""
    optimizer = KINDS[kind](network.parameters())
    rule = UpdateRule.from_optimizer(optimizer)
    assert isinstance(rule.preconditioner, UnknownPreconditioner)
    assert rule.preconditioned
    with pytest.raises(ValueError, match="has not taken a step"):
        rule.preconditioner @ torch.ones(38)
    quantities = ("sharpness", "non_uniformity")
    message = r"(preconditioned_sharpness|non_uniformity) was not measured: .* has not taken a step"
    with pytest.warns(RuntimeWarning, match=message):
        margins = measure(
            network,
            MSE,
            data,
            optimizer=optimizer,
            batch_size=2,
            quantities=quantities if rule.diagonal else ("sharpness",),
            tol=1e-6,
        )
    h = dense_hessians(network, MSE, *data).mean(0)
    assert margins.sharpness == pytest.approx(top(h), rel=1e-6)
    assert margins.failure is None
    for name in ("sharpness", "preconditioned_sharpness", "non_uniformity"):
        assert getattr(margins, f"{name}_limit") is None
    unknown = (margins.preconditioned_sharpness, margins.limited_sharpness, margins.non_uniformity)
    assert (*unknown, margins.stable) == (None,) * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_a_copy_and_survives_checkpoints(
    kind: str, network: nn.Module, data: Data
) -> None:
    """Catches entries that change with later steps, and a reader that needs more than a checkpoint
    has.
    """
    torch.manual_seed(0)
    optimizer = KINDS[kind](network.parameters())
    take(optimizer, network, data, 3)
    rule = UpdateRule.from_optimizer(optimizer)
    before = dense(rule)
    restored = KINDS[kind](network.parameters())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(dense(UpdateRule.from_optimizer(restored)), before)
    assert UpdateRule.from_optimizer(restored).max_sharpness == rule.max_sharpness
    take(optimizer, network, data)
    assert torch.equal(dense(rule), before)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_matched_by_identity(kind: str, network: nn.Module, data: Data) -> None:
    """Catches P in the optimizer's order next to a Hessian in the model's, and, where only some
    parameters count, entries of the others.
    """
    torch.manual_seed(0)
    backwards = list(network.parameters())[::-1]
    optimizer = KINDS[kind](backwards)
    take(optimizer, network, data, 3)
    h = dense_hessians(network, MSE, *data).mean(0)
    sizes = [p.numel() for p in backwards]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    index = torch.cat([torch.arange(a, b) for a, b in itertools.pairwise(starts)][::-1])
    p = dense(UpdateRule.from_optimizer(optimizer))[index][:, index]
    margins = measure(network, MSE, data, optimizer=optimizer, quantities=("sharpness",), tol=1e-10)
    assert margins.preconditioned_sharpness == pytest.approx(top(p @ h), rel=1e-8)
    head = list(network[2].parameters())
    of_head = measure(
        network, MSE, data, optimizer=optimizer, quantities=("sharpness",), params=head, tol=1e-10
    )
    expected = top(p[20:, 20:] @ h[20:, 20:])
    assert of_head.preconditioned_sharpness == pytest.approx(expected, rel=1e-8)


def test_parameters_that_came_late_have_their_own_bias_correction(
    network: nn.Module, data: Data
) -> None:
    """Catches one step count for all: a layer that thaws is at step 1 where others are at 6. Until its
    first step it does not move, so its entries are zero.
    """
    network[0].requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    take(optimizer, network, data, 5)
    rule = UpdateRule.from_optimizer(optimizer)
    assert isinstance(rule.preconditioner, DiagonalPreconditioner)
    assert [float(torch.as_tensor(e).max()) > 0 for e in rule.preconditioner.entries] == [
        False,
        False,
        True,
        True,
    ]
    network[0].requires_grad_(True)
    take(optimizer, network, data)
    late, early = network[0].weight, network[2].weight
    entries = UpdateRule.from_optimizer(optimizer).preconditioner.entries  # type: ignore[union-attr]
    # At step 1 both averages are the gradient: the step is its sign times the rate.
    expected = 1 / (0.1 * (late.grad.abs() + 1e-8))
    assert torch.allclose(entries[0], expected, rtol=1e-6)
    root = (optimizer.state[early]["exp_avg_sq"] / (1 - 0.999**6)).sqrt()
    assert torch.allclose(entries[2], 1 / ((1 - 0.9**6) * (root + 1e-8)), rtol=1e-6)


def test_a_fused_step_that_a_scaler_skipped_is_no_step(network: nn.Module) -> None:
    """Catches 0/0: a state of zeros whose count is zero."""
    optimizer = torch.optim.Adam(network.float().parameters(), lr=0.01, fused=True)
    for p in network.parameters():
        p.grad = torch.full_like(p, math.inf)
    optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert UpdateRule.from_optimizer(optimizer).unknown is not None


def test_nadam_with_parameters_at_different_steps_is_refused(
    network: nn.Module, data: Data
) -> None:
    """Catches the momentum of one parameter taken for that of all: NAdam's changes with its steps."""
    network[0].requires_grad_(False)
    optimizer = torch.optim.NAdam(network.parameters(), lr=0.01)
    take(optimizer, network, data, 2)
    network[0].requires_grad_(True)
    take(optimizer, network, data)
    with pytest.raises(ValueError, match="as many steps where the momentum changes"):
        UpdateRule.from_optimizer(optimizer)


def test_apollo_warms_up(network: nn.Module, data: Data) -> None:
    """Catches the rate of the next step for that of the last, on which Apollo's limit depends."""
    optimizer = torch_optimizer.Apollo(network.parameters(), lr=0.5, warmup=4, init_lr=0.1)
    rates = []
    for _ in range(6):
        take(optimizer, network, data)
        rates.append(UpdateRule.from_optimizer(optimizer).lr)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


@pytest.mark.filterwarnings("ignore:This overload of add")  # the class's own
@pytest.mark.parametrize(("t", "last_beta"), [(3, 0.999), (5, 0.999), (40, 0.999), (40, 0.95)])
def test_rectified_adabelief(t: int, last_beta: float, network: nn.Module, data: Data) -> None:
    """Catches the rectification upside down, and that of another beta than the optimizer's first.

    The real class's step is -eta P m, with m its average.
    """
    optimizer = torch_optimizer.AdaBelief(network.parameters(), lr=0.01, rectify=True)
    take(optimizer, network, data, t - 1)
    optimizer.param_groups[0]["betas"] = (0.9, last_beta)
    before = torch.cat([p.detach().clone().reshape(-1) for p in network.parameters()])
    take(optimizer, network, data, 1)
    after = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    mean = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in network.parameters()])
    rule = UpdateRule.from_optimizer(optimizer)
    assert rule.preconditioner is not None
    step = -rule.lr * (rule.preconditioner @ mean)
    assert float((after - before - step).norm() / step.norm()) < 1e-10
