"""Reading update rules from optimizers: the registry, empty states, groups, and refusals."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_optimizer
from oracles import covariance, dense_hessians, small_data, small_network
from torch import Tensor, nn

import stableopt
from stableopt import StabilityMonitor, UpdateRule, measure
from stableopt.curvature import Problem
from stableopt.stability import (
    DiagonalPreconditioner,
    MatrixPreconditioner,
    UnknownPreconditioner,
    noise_factor,
)

Data = tuple[Tensor, Tensor]
MSE = nn.MSELoss()

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3),
    "stableopt.LBFGS": lambda params: stableopt.LBFGS(params, lr=0.5, max_iter=3),
    "Yogi": torch_optimizer.Yogi,
    "AdaBelief": torch_optimizer.AdaBelief,
    "Adahessian": torch_optimizer.Adahessian,
    "Apollo": torch_optimizer.Apollo,
    "Shampoo": torch_optimizer.Shampoo,
}


def take(optimizer: torch.optim.Optimizer, model: nn.Module, data: Data, steps: int = 1) -> None:
    for _ in range(steps):

        def closure() -> Tensor:
            loss = MSE(model(data[0]), data[1])
            params = [p for p in model.parameters() if p.requires_grad]
            graph = isinstance(optimizer, torch_optimizer.Adahessian)
            gradients = torch.autograd.grad(loss, params, create_graph=graph)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()  # a view could not be worked on in place
            return loss

        closure()
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            optimizer.step()


def dense(rule: UpdateRule, d: int = 38) -> Tensor:
    assert rule.preconditioner is not None
    rows = torch.eye(d, dtype=torch.float64)
    return torch.stack([rule.preconditioner @ row for row in rows], dim=1)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).real.max())


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
    both = ("sharpness", "non_uniformity")
    with pytest.warns(RuntimeWarning, match="not known: .* has not taken a step"):
        found = measure(
            network,
            MSE,
            data,
            optimizer=optimizer,
            batch_size=2,
            quantities=both if rule.diagonal else ("sharpness",),
            tol=1e-6,
        )
    h = dense_hessians(network, MSE, *data).mean(0)
    assert found.sharpness == pytest.approx(top(h), rel=1e-6)
    assert found.failure is None
    for name in ("sharpness", "preconditioned_sharpness", "non_uniformity"):
        assert getattr(found, f"{name}_limit") is None
    assert (found.preconditioned_sharpness, found.non_uniformity, found.stable) == (None,) * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_is_a_copy_and_survives_checkpoints(
    kind: str, network: nn.Module, data: Data
) -> None:
    """Catches entries that follow later steps, and a state that is read by what a checkpoint lacks."""
    torch.manual_seed(0)
    optimizer = KINDS[kind](network.parameters())
    take(optimizer, network, data, 3)
    rule = UpdateRule.from_optimizer(optimizer)
    before = dense(rule)
    again = KINDS[kind](network.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(dense(UpdateRule.from_optimizer(again)), before)
    assert UpdateRule.from_optimizer(again).max_sharpness == rule.max_sharpness
    take(optimizer, network, data)
    assert torch.equal(dense(rule), before)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_matched_by_identity(kind: str, network: nn.Module, data: Data) -> None:
    """Catches P taken in the optimizer's order for a Hessian in the model's, and a part of it taken
    with what is left out.
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
    found = measure(network, MSE, data, optimizer=optimizer, quantities=("sharpness",), tol=1e-10)
    assert found.preconditioned_sharpness == pytest.approx(top(p @ h), rel=1e-8)
    head = list(network[2].parameters())
    part = measure(
        network, MSE, data, optimizer=optimizer, quantities=("sharpness",), params=head, tol=1e-10
    )
    expected = top(p[20:, 20:] @ h[20:, 20:])
    assert part.preconditioned_sharpness == pytest.approx(expected, rel=1e-8)


def test_torch_optimizer_is_not_imported_and_its_classes_are_known() -> None:
    """Catches an optional package that has become a requirement."""
    code = (
        "import sys, torch, stableopt; assert 'torch_optimizer' not in sys.modules;"
        "import torch_optimizer;"
        "rule = stableopt.UpdateRule.from_optimizer(torch_optimizer.Yogi([torch.zeros(1)], lr=0.5));"
        "print(rule.max_sharpness)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(76.0)


def test_a_subclass_with_a_step_of_its_own_is_unknown() -> None:
    """Catches the rule of the parent, read silently for a subclass that takes other steps."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    class Same(torch.optim.SGD):
        pass

    params = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(TypeError, match=r"UpdateRule\.register\(Own, .*update_rule="):
        UpdateRule.from_optimizer(Own(params, lr=0.1))
    for kind in (Same, stableopt.SGD, stableopt.GD, stableopt.LBFGS, torch.optim.AdamW):
        optimizer = kind(params, lr=0.1)
        torch.optim.lr_scheduler.StepLR(optimizer, 5)  # patches step on the instance
        assert UpdateRule.from_optimizer(optimizer).lr == 0.1


def test_registering_by_class_by_name_and_for_subclasses() -> None:
    """Catches a subclass that is read by its parent's reader although it has its own."""

    class Parent(torch.optim.Rprop):
        pass

    class Child(Parent):
        pass

    params = [torch.zeros(1)]
    with pytest.raises(TypeError, match=r"UpdateRule\.register\(Parent, .*update_rule="):
        UpdateRule.from_optimizer(Parent(params))
    UpdateRule.register(
        f"{Parent.__module__}.{Parent.__qualname__}", lambda optimizer: UpdateRule(lr=0.5)
    )
    assert UpdateRule.from_optimizer(Child(params)).lr == 0.5
    UpdateRule.register(Child, lambda optimizer: UpdateRule(lr=0.25))
    assert (
        UpdateRule.from_optimizer(Parent(params)).lr,
        UpdateRule.from_optimizer(Child(params)).lr,
    ) == (0.5, 0.25)
    with pytest.raises(TypeError, match="kind=5"):
        UpdateRule.register(5, lambda optimizer: UpdateRule(lr=1.0))  # type: ignore[arg-type]


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
    own = torch.stack([root @ h @ root for h in hessians])
    h, sigma = own.mean(0) + 0.4 * root @ root, covariance(own)
    found = measure(
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
    assert found.preconditioned_sharpness == pytest.approx(top(h), rel=1e-8)
    assert found.non_uniformity == pytest.approx(math.sqrt(top(sigma)), rel=1e-8)
    assert found.non_uniformity_limit == pytest.approx(math.sqrt(2 * 6 / 5) / 0.003)
    assert found.theorem1 == pytest.approx(top(bound), rel=1e-8)
    assert found.loss == pytest.approx(float(MSE(network(data[0]), data[1]).detach()))


@pytest.mark.parametrize("kind", ["LBFGS", "Shampoo"])
def test_a_preconditioner_that_is_not_diagonal_has_no_non_uniformity(
    kind: str, network: nn.Module, data: Data
) -> None:
    """Catches a number for what cannot be measured, and a default that raises."""
    optimizer = KINDS[kind](network.parameters())
    take(optimizer, network, data, 3)
    found = measure(network, MSE, data, optimizer=optimizer, batch_size=2)
    assert found.preconditioned_sharpness is not None
    assert found.non_uniformity is None
    assert found.non_uniformity_limit == (math.inf if kind == "LBFGS" else None)
    for name in ("non_uniformity", "theorem1"):
        with pytest.raises(ValueError, match=f"{name} needs a preconditioner with a root"):
            measure(network, MSE, data, optimizer=optimizer, batch_size=2, quantities=(name,))


def test_shampoo_whose_momentum_feeds_on_itself_has_no_limit(
    network: nn.Module, data: Data
) -> None:
    """Catches a limit where the updates grow without any curvature: the real class does so too."""
    optimizer = torch_optimizer.Shampoo(network.parameters(), lr=1e-3, momentum=0.9)
    take(optimizer, network, data, 2)
    assert "momentum times the largest eigenvalue" in str(
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
    first = torch.optim.LBFGS(network.parameters(), lr=1.0, max_iter=1)
    take(first, network, data)
    # The first step is along the gradient, at a length of torch's own.
    assert UpdateRule.from_optimizer(first).lr == float(first.state[network[0].weight]["t"]) != 1.0
    assert torch.equal(dense(UpdateRule.from_optimizer(first)), torch.eye(38, dtype=torch.float64))


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
            found = monitor.measure()
    else:
        found = measure(network, MSE, data, update_rule=rule, tol=1e-10)
    assert found.preconditioned_sharpness == pytest.approx(top(matrix @ h), rel=1e-8)
    assert found.preconditioned_sharpness_limit == 20.0


def test_a_monitor_follows_adam(network: nn.Module, data: Data) -> None:
    """Catches a preconditioner read once, and warm starts in coordinates that have moved on."""
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    monitor = StabilityMonitor(optimizer, network, MSE, data, every=1, tol=1e-9, batch_size=7)
    for _ in range(4):
        take(optimizer, network, data)
        h = dense_hessians(network, MSE, *data).mean(0)
        found = monitor.margins
        assert found is not None
        expected = top(dense(UpdateRule.from_optimizer(optimizer)) @ h)
        # The residual of 1e-9 is squared in a Ritz value.
        assert found.preconditioned_sharpness == pytest.approx(expected, rel=1e-8)
        assert found.preconditioned_sharpness_limit == pytest.approx(3800.0)
        assert found.sharpness == pytest.approx(top(h), rel=1e-8)
        assert found.converged
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
    found = measure(model, MSE, data, optimizer=optimizer)
    assert found.preconditioned_sharpness_ratio is not None
    assert found.preconditioned_sharpness_ratio > 1
    assert found.stable is False


BAD: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "betas": (
        lambda m: UpdateRule.from_optimizer(
            torch.optim.Adam(
                [{"params": [m[0].weight], "betas": (0.5, 0.9)}, {"params": [m[2].weight]}]
            )
        ),
        ValueError,
        r"momentum \(beta, tau, nu\) of \(0\.5, 0\.5, 1\.0\) and \(0\.9",
    ),
    "maximize": (
        lambda m: UpdateRule.from_optimizer(
            torch.optim.Adam(
                [{"params": [m[0].weight], "maximize": True}, {"params": [m[2].weight]}]
            )
        ),
        ValueError,
        r"maximize \[True, False\]",
    ),
    "complex": (
        lambda m: UpdateRule.from_optimizer(
            torch.optim.Adam([torch.zeros(2, dtype=torch.complex64)])
        ),
        TypeError,
        "complex64",
    ),
    "a matrix alone": (
        lambda m: UpdateRule(lr=0.1, preconditioner=torch.eye(38)),  # type: ignore[arg-type]
        TypeError,
        "MatrixPreconditioner",
    ),
    "rates twice": (
        lambda m: UpdateRule(
            lr=0.1, group_lrs=(0.1, 0.2), preconditioner=DiagonalPreconditioner([], [])
        ),
        ValueError,
        "group_lrs with a preconditioner",
    ),
    "too few entries": (
        lambda m: DiagonalPreconditioner(m.parameters(), [1.0]),
        ValueError,
        "1 values: expected one for each of the 4",
    ),
    "entries of another shape": (
        lambda m: DiagonalPreconditioner([m[0].weight], [torch.ones(3, 5)]),
        ValueError,
        r"\(3, 5\) for a parameter of shape \(5, 3\)",
    ),
    "a vector of another size": (
        lambda m: DiagonalPreconditioner([m[0].weight], [1.0]) @ torch.ones(3),
        ValueError,
        r"@ \(3,\): expected \(15,\)",
    ),
    "a parameter that P does not know": (
        lambda m: measure(
            m,
            MSE,
            small_data(),
            update_rule=UpdateRule(
                lr=0.1, preconditioner=DiagonalPreconditioner([m[0].weight], [1.0])
            ),
        ),
        ValueError,
        "not one of the 1 of the preconditioner",
    ),
    "preconditioned sharpness of SGD": (
        lambda m: measure(m, MSE, small_data(), lr=0.1, quantities=("preconditioned_sharpness",)),
        ValueError,
        "needs an optimizer with a preconditioner",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, network: nn.Module) -> None:
    """Catches an error from deep inside, or a wrong number without one."""
    call, kind, named = BAD[case]
    with warnings.catch_warnings(), pytest.raises(kind, match=named):
        call(network)


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
    found = []
    for _ in range(6):
        take(optimizer, network, data)
        found.append(UpdateRule.from_optimizer(optimizer).lr)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])


@pytest.mark.filterwarnings("ignore:This overload of add")  # the class's own
@pytest.mark.parametrize("t", [3, 5, 40])
def test_rectified_adabelief(t: int, network: nn.Module, data: Data) -> None:
    """Catches the rectification upside down: the real class's step is -eta P m, m its average."""
    optimizer = torch_optimizer.AdaBelief(network.parameters(), lr=0.01, rectify=True)
    take(optimizer, network, data, t - 1)
    before = torch.cat([p.detach().clone().reshape(-1) for p in network.parameters()])
    take(optimizer, network, data, 1)
    after = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    mean = torch.cat([optimizer.state[p]["exp_avg"].reshape(-1) for p in network.parameters()])
    rule = UpdateRule.from_optimizer(optimizer)
    assert rule.preconditioner is not None
    step = -rule.lr * (rule.preconditioner @ mean)
    assert float((after - before - step).norm() / step.norm()) < 1e-10


def test_problem_coordinates_of_float32(data: Data) -> None:
    """Catches entries in the dtype of the state, float64 factors for float32 parameters."""
    model = small_network().float()
    x, y = data[0].float(), data[1].float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    take(optimizer, model, (x, y), 2)
    found = measure(model, MSE, (x, y), optimizer=optimizer, batch_size=1)
    assert found.preconditioned_sharpness is not None
    assert Problem(model, MSE, (x, y)).dtype == torch.float32
