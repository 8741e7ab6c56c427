"""Margins of preconditioned rules: what is measured, and which limits they have."""

from __future__ import annotations

import math

import pytest
import torch
import torch_optimizer
from optimizer_steps import KINDS, MSE, Data, dense, take, top
from oracles import covariance, dense_hessians, small_data, small_network
from torch import nn

from stableopt import StabilityMonitor, UpdateRule, measure
from stableopt.curvature import Problem
from stableopt.stability import (
    MatrixPreconditioner,
    noise_factor,
)


def test_non_uniformity_and_theorem_1_are_those_of_preconditioned_samples(
    network: nn.Module, data: Data
) -> None:
    """Catches the plain non-uniformity next to a limit of the preconditioned one, and a decay in
    condition (8) twice: RMSprop without momentum is plain SGD in other coordinates.
    """
    optimizer = torch.optim.RMSprop(network.parameters(), lr=0.003, weight_decay=0.4, eps=0.1)
    take(optimizer, network, data, 4)
    hessians = dense_hessians(network, MSE, *data)
    root = dense(UpdateRule.from_optimizer(optimizer)).sqrt()
    preconditioned = torch.stack([root @ h @ root for h in hessians])
    h, sigma = preconditioned.mean(0) + 0.4 * root @ root, covariance(preconditioned)
    margins = measure(
        network,
        MSE,
        data,
        optimizer=optimizer,
        batch_size=2,
        quantities=("sharpness", "non_uniformity", "theorem1"),
        tol=1e-9,
    )
    contraction = torch.eye(38, dtype=torch.float64) - 0.003 * h
    bound = contraction @ contraction + 0.003**2 * noise_factor(2, 7) * sigma
    assert margins.preconditioned_sharpness == pytest.approx(top(h), rel=1e-8)
    assert margins.non_uniformity == pytest.approx(math.sqrt(top(sigma)), rel=1e-8)
    assert margins.non_uniformity_limit == pytest.approx(math.sqrt(2 * 6 / 5) / 0.003)
    assert margins.theorem1 == pytest.approx(top(bound), rel=1e-8)
    assert margins.loss == pytest.approx(float(MSE(network(data[0]), data[1]).detach()))


@pytest.mark.parametrize("kind", ["LBFGS", "Shampoo"])
def test_a_preconditioner_that_is_not_diagonal_has_no_non_uniformity(
    kind: str, network: nn.Module, data: Data
) -> None:
    """Catches a number for what cannot be measured, and a default that raises."""
    optimizer = KINDS[kind](network.parameters())
    take(optimizer, network, data, 3)
    margins = measure(network, MSE, data, optimizer=optimizer, batch_size=2)
    assert margins.preconditioned_sharpness is not None
    assert margins.non_uniformity is None
    assert margins.non_uniformity_limit == (math.inf if kind == "LBFGS" else None)
    for name in ("non_uniformity", "theorem1"):
        with pytest.raises(ValueError, match=f"{name} needs a preconditioner with a root"):
            measure(network, MSE, data, optimizer=optimizer, batch_size=2, quantities=(name,))


def test_shampoo_whose_momentum_feeds_on_itself_has_no_limit(
    network: nn.Module, data: Data
) -> None:
    """Catches a limit where the updates grow without any curvature: the real class does so too."""
    optimizer = torch_optimizer.Shampoo(network.parameters(), lr=1e-3, momentum=0.9)
    take(optimizer, network, data, 2)
    assert "momentum times the preconditioner's largest eigenvalue" in str(
        UpdateRule.from_optimizer(optimizer).unknown
    )
    # Without a gradient, and too small to change the preconditioner.
    state = optimizer.state[network[2].weight]
    state["momentum_buffer"] *= 1e-12
    before = float(state["momentum_buffer"].norm())
    for _ in range(20):
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float(state["momentum_buffer"].norm()) > 10 * before


def test_lbfgs_takes_the_length_that_its_line_search_chose(network: nn.Module, data: Data) -> None:
    """Catches the learning rate taken for the length that the line search chose."""
    optimizer = torch.optim.LBFGS(
        network.parameters(), lr=1.0, max_iter=3, line_search_fn="strong_wolfe"
    )
    take(optimizer, network, data, 2)
    length = optimizer.state[network[0].weight]["t"]
    assert UpdateRule.from_optimizer(optimizer).lr == float(length)
    one_step = torch.optim.LBFGS(network.parameters(), lr=1.0, max_iter=1)
    take(one_step, network, data)
    # The first step is along the gradient, at a length of torch's own.
    rule = UpdateRule.from_optimizer(one_step)
    assert rule.lr == float(one_step.state[network[0].weight]["t"]) != 1.0
    assert torch.equal(dense(rule), torch.eye(38, dtype=torch.float64))


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_rule_that_the_user_gives_may_have_a_preconditioner(
    with_optimizer: bool, network: nn.Module, data: Data
) -> None:
    """Catches a given P that is dropped, or put next to the limit of the plain sharpness."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(38, 38, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 38 + torch.eye(38, dtype=torch.float64)
    h = dense_hessians(network, MSE, *data).mean(0) + 0.2 * torch.eye(38, dtype=torch.float64)
    rule = UpdateRule(
        lr=0.1,
        weight_decay=0.2,
        preconditioner=MatrixPreconditioner(network.parameters(), matrix),
    )
    if with_optimizer:
        optimizer = torch.optim.Rprop(network.parameters())
        with StabilityMonitor(
            optimizer, network, MSE, data, update_rule=lambda optimizer: rule, tol=1e-10
        ) as monitor:
            margins = monitor.measure()
    else:
        margins = measure(network, MSE, data, update_rule=rule, tol=1e-10)
    assert margins.preconditioned_sharpness == pytest.approx(top(matrix @ h), rel=1e-8)
    assert margins.preconditioned_sharpness_limit == 20.0


def test_a_monitor_follows_adam(network: nn.Module, data: Data) -> None:
    """Catches a preconditioner read once, and warm starts in coordinates that have moved on."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    monitor = StabilityMonitor(optimizer, network, MSE, data, every=1, tol=1e-9, batch_size=7)
    for _ in range(4):
        take(optimizer, network, data)
        h = dense_hessians(network, MSE, *data).mean(0)
        margins = monitor.margins
        assert margins is not None
        expected = top(dense(UpdateRule.from_optimizer(optimizer)) @ h)
        # The residual of 1e-9 is squared in a Ritz value.
        assert margins.preconditioned_sharpness == pytest.approx(expected, rel=1e-8)
        assert margins.preconditioned_sharpness_limit == pytest.approx(3800.0)
        assert margins.sharpness == pytest.approx(top(h), rel=1e-8)
        assert margins.converged
    state = monitor.state_dict()
    assert {"sharpness", "preconditioned_sharpness"} == set(state["starts"])
    monitor.load_state_dict(state)
    monitor.close()


def test_steps_on_the_wrong_side_of_the_limit_are_seen_to_be_unstable() -> None:
    """Catches a `stable` that looks at the plain sharpness alone."""
    model, data = small_network(), small_data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    take(optimizer, model, data, 3)
    optimizer.param_groups[0]["lr"] = 1e6
    margins = measure(model, MSE, data, optimizer=optimizer)
    assert margins.preconditioned_sharpness_ratio is not None
    assert margins.preconditioned_sharpness_ratio > 1
    assert margins.stable is False


def test_problem_coordinates_of_float32(data: Data) -> None:
    """Catches entries in the dtype of the state, float64 factors for float32 parameters."""
    model = small_network().float()
    x, y = data[0].float(), data[1].float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    take(optimizer, model, (x, y), 2)
    margins = measure(model, MSE, (x, y), optimizer=optimizer, batch_size=1)
    assert margins.preconditioned_sharpness is not None
    assert Problem(model, MSE, (x, y)).dtype == torch.float32
