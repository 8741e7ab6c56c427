"""Modules and parameters that a loss holds: modules are isolated, parameters are named."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import covariance, dense_hessians, relative_error, small_data
from torch import Tensor, nn

import stableopt
from stableopt.curvature import DualCurvature, Hessian, NonUniformity, Problem, top_eigenpair
from stableopt.curvature.problem.held import Held

F = nn.functional


def generator() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))


CRITICS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 4)), nn.ReLU()),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1)),
}


@pytest.mark.parametrize("kind", CRITICS)
def test_a_measurement_leaves_no_trace_in_a_module_of_the_loss(kind: str) -> None:
    """Catches a generator's measurement that updates the discriminator's statistics or power
    iteration.
    """
    critic, model, z = CRITICS[kind]().requires_grad_(False), generator(), torch.randn(32, 4)
    before = {name: value.clone() for name, value in critic.state_dict().items()}

    def loss(model: nn.Module, z: Tensor) -> Tensor:
        return F.softplus(-critic(model(z))).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the model has batch norm")
        problem = Problem.from_batch_loss(model, loss, z)
    with stableopt.StabilityMonitor(optimizer, problem, every=1) as monitor:
        monitor.measure()
    product = Hessian(problem) @ torch.ones(problem.num_params)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    critic.eval()  # the mode in which it is measured, as the model is
    expected = Hessian(Problem.from_batch_loss(model, loss, z)) @ torch.ones(problem.num_params)
    assert torch.equal(product, expected)


def test_modules_of_the_loss_keep_their_mode_and_follow_the_precision() -> None:
    """Catches a mode that is left changed, and a module that stays in another precision."""
    critic, model, z = nn.Linear(6, 1).requires_grad_(False), generator(), torch.randn(8, 4)
    problem = Problem.from_batch_loss(
        model, lambda model, z: critic(model(z)).square().mean(), z, dtype=torch.float64
    )
    assert top_eigenpair(Hessian(problem), tol=1e-6).converged
    assert critic.training
    assert critic.weight.dtype == torch.float32


def listed(model: nn.Module) -> Any:
    params = list(model.parameters())
    return lambda out, y: F.mse_loss(out, y) + 0.1 * sum(p.square().sum() for p in params)


def of_optimizer(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return F.mse_loss(out, y) + 0.1 * sum(p.square().sum() for p in params)

    return loss


class Tied(nn.Module):
    """Reads a weight through a plain list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh(), self.tied[0])


@pytest.mark.parametrize(
    ("make_model", "make_loss", "name"),
    [
        (lambda: nn.Linear(4, 2), listed, "weight"),
        (lambda: nn.Linear(4, 2), of_optimizer, "weight"),
        (Tied, lambda model: nn.MSELoss(), "first.weight"),
    ],
    ids=["list made before", "param_groups", "plain list"],
)
def test_a_parameter_held_besides_the_model_is_named(
    make_model: Any, make_loss: Any, name: str
) -> None:
    """Catches curvature that lacks a term: 1.69 was measured where 5.69 is right."""
    model = make_model()
    data = torch.randn(8, 4), torch.randn(8, model(torch.zeros(1, 4)).shape[1])
    with pytest.raises(ValueError, match=f"parameter '{name}' enters the loss other than"):
        Problem(model, make_loss(model), data)


def test_a_weak_proxy_of_a_module_stands_for_the_module() -> None:
    """Catches Lightning's proxies, which are not hashable, as an error."""
    model, critic = nn.Linear(2, 1), nn.Sequential(nn.BatchNorm1d(1))
    model.proxies = [weakref.proxy(critic), critic, weakref.proxy(model)]
    assert Held(model, F.mse_loss).modules == [critic]


def test_a_penalty_read_from_the_model_counts() -> None:
    """Catches a refusal of the alternative that the error message suggests."""
    model, (x, y) = nn.Linear(4, 1, bias=False).double(), torch.randn(2, 8, 4).double()
    y = y[:, :1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(batch[0]), batch[1]) + 0.1 * penalty

    pair = top_eigenpair(Hessian(Problem.from_batch_loss(model, loss, [(x, y)])), tol=1e-10)
    expected = float(torch.linalg.eigvalsh(2 * x.T @ x / 8)[-1]) + 0.2
    assert pair.value == pytest.approx(expected, rel=1e-9)  # the solver's rounding


def test_trainable_tensors_of_the_loss_are_named_as_constants() -> None:
    """Catches a learned uncertainty whose curvature is left out in silence."""
    scale = nn.Parameter(torch.zeros(()))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return (-scale).exp() * F.mse_loss(out, y) + scale

    data = torch.randn(8, 4), torch.randn(8, 6)
    with pytest.warns(UserWarning, match=r"a tensor \(\)\. They count as constants"):
        Problem(generator(), loss, data)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return (-self.scale).exp() * F.mse_loss(out, y) + self.scale

    with pytest.warns(UserWarning, match=r"loss_fn\.scale \(\)\. They count as constants"):
        Problem(generator(), Learned(), data)


def test_parameters_left_out_and_inputs_are_not_named() -> None:
    """Catches a warning about what the user chose, or about forces, which differentiate the inputs."""
    model = generator()
    Problem(model, nn.MSELoss(), (torch.randn(8, 4), torch.randn(8, 6)), params=[model[0].weight])

    def forces(model: nn.Module, batch: Tensor) -> Tensor:
        inputs = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        return slope.square().mean()

    Problem.from_batch_loss(model, forces, torch.randn(8, 4))


def masked(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * rows


@pytest.mark.usefixtures("double_by_default")
def test_masks_on_gradients_project_the_curvature() -> None:
    """Catches frozen entries whose curvature counts: 47.1 was measured where 3.4 trains. Each sample's
    Hessian is that of the entries that train, with learning rates by group as well.
    """
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), small_data()
    norms: list[float] = []
    mask = torch.ones(12, 1).cumsum(0).remainder(3).view(4, 3).clamp(max=1)
    y = y[:, :2]
    hessians = dense_hessians(model, nn.MSELoss(), x, y)
    model[0].weight.register_hook(masked(mask))
    model[2].bias.register_hook(lambda gradient: 0 * gradient)
    model[2].weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    state = torch.get_rng_state()
    problem = Problem(model, nn.MSELoss(), (x, y))
    assert not norms
    assert torch.equal(torch.get_rng_state(), state)
    d = torch.cat([mask.flatten(), torch.ones(4 + 8), torch.zeros(2)])
    v = torch.ones(len(d))
    for factors in ([1.0] * 4, [2.0, 3.0, 1.0, 1.0]):
        scaled = problem.transformed(scale=factors)
        sizes = [p.numel() for p in model.parameters()]
        scale = d * torch.cat([torch.full((n,), f) for n, f in zip(sizes, factors, strict=True)])
        projected = scale.unsqueeze(1) * hessians * scale
        assert relative_error(Hessian(scaled) @ v, projected.mean(0) @ v) < 1e-13
        assert relative_error(NonUniformity(scaled) @ v, covariance(projected) @ v) < 1e-13
    exact = 2 / float(torch.linalg.eigvalsh(projected.mean(0))[-1])
    critical = stableopt.critical_lr(scaled, batch_size=len(x)).full_batch
    # Of Gauss-Newton matrices: the same directions.
    assert critical == pytest.approx(exact, rel=0.5)


CHANGING: dict[str, Callable[[Tensor], Tensor | None]] = {
    "clipped": lambda gradient: gradient.clamp(-0.1, 0.1),
    "scaled": lambda gradient: 0.5 * gradient,
    "noisy": lambda gradient: gradient + torch.randn_like(gradient),
    "failing": lambda gradient: gradient[:, 5:] @ gradient,
}


@pytest.mark.parametrize("kind", CHANGING)
def test_other_gradient_hooks_are_named(kind: str) -> None:
    """Catches a hook taken for a mask because it acts like one on some gradients."""
    model = nn.Linear(4, 2)
    handle = model.weight.register_hook(CHANGING[kind])
    data, state = (torch.randn(8, 4), torch.randn(8, 2)), torch.get_rng_state()
    with pytest.warns(UserWarning, match="parameters with gradient hooks: 'weight'"):
        Problem(model, nn.MSELoss(), data)
    assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    Problem(model, nn.MSELoss(), data)


class Uncertain(nn.Module):
    """Learned weights of several outputs, as in multi-task training (Kendall et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = (outputs - targets).square().mean(0)
        return (errors * (-self.log_variance).exp() + self.log_variance).sum()


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("form", ["module", "closure", "batch loss"])
def test_parameters_of_the_loss_count_if_they_are_named(form: str) -> None:
    """Catches learned weights of the loss that count as constants though the user names them."""
    loss_fn, (x, y) = Uncertain(), small_data()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    params = [*model.parameters(), loss_fn.log_variance]
    if form == "batch loss":

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return loss_fn(model(batch["x"]), batch["y"])

        problem = Problem.from_batch_loss(model, loss, {"x": x, "y": y}, params=params)
    else:
        closure = loss_fn if form == "module" else lambda outputs, y: loss_fn(outputs, y)
        problem = Problem(model, closure, (x, y), params=params)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss_fn = model, loss_fn

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    hessians = dense_hessians(Whole(), loss_fn, x, y)
    v = torch.ones(problem.num_params)
    assert relative_error(Hessian(problem) @ v, hessians.mean(0) @ v) < 1e-13
    assert relative_error(NonUniformity(problem) @ v, covariance(hessians) @ v) < 1e-13
    assert problem.current() is problem
    if form == "module":
        with pytest.raises(ValueError, match=r"loss_fn\.log_variance belong to the loss"):
            DualCurvature.from_problem(problem)
        optimizer = stableopt.SGD(params, lr=0.01)
        optimizer.track(model, loss_fn, (x, y), params=params, every=1)
        loss_fn(model(x), y).backward()
        optimizer.step()
        assert optimizer.margins is not None
        assert optimizer.margins.converged
    lone = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="nor of a module that loss_fn holds"):
        Problem(model, lambda z, t: lone * loss_fn(z, t), (x, y), params=[*params, lone])
