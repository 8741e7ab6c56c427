"""What a loss holds by itself is found: modules are isolated, parameters are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stableopt
from stableopt.curvature import Hessian, Problem, top_eigenpair

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
    """Catches statistics, or a power iteration, of a discriminator that a generator's measurement
    moves on.
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
    found = Hessian(problem) @ torch.ones(problem.num_params)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    critic.eval()  # the mode in which it is measured, as the model is
    expected = Hessian(Problem.from_batch_loss(model, loss, z)) @ torch.ones(problem.num_params)
    assert torch.equal(found, expected)


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
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return F.mse_loss(out, y) + 0.1 * sum(p.square().sum() for p in held)

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


def test_a_penalty_read_from_the_model_counts() -> None:
    """Catches a refusal of the way out that the error names."""
    model, (x, y) = nn.Linear(4, 1, bias=False).double(), torch.randn(2, 8, 4).double()
    y = y[:, :1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(batch[0]), batch[1]) + 0.1 * penalty

    found = top_eigenpair(Hessian(Problem.from_batch_loss(model, loss, [(x, y)])), tol=1e-10)
    expected = float(torch.linalg.eigvalsh(2 * x.T @ x / 8)[-1]) + 0.2
    assert found.value == pytest.approx(expected, rel=1e-9)  # the solver's rounding


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
        at = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
        return slope.square().mean()

    Problem.from_batch_loss(model, forces, torch.randn(8, 4))


def test_gradient_hooks_are_named() -> None:
    """Catches a masked weight whose curvature counts: 47.1 was measured where 3.4 trains."""
    model = nn.Linear(4, 2)
    handle = model.weight.register_hook(lambda gradient: 0 * gradient)
    data = torch.randn(8, 4), torch.randn(8, 2)
    with pytest.warns(UserWarning, match="parameters with gradient hooks: 'weight'"):
        Problem(model, nn.MSELoss(), data)
    handle.remove()
    Problem(model, nn.MSELoss(), data)
