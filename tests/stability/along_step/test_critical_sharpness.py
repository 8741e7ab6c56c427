"""The critical sharpness against closed forms on quadratics, and against a scan of the loss."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from first_order import half_squares, quadratic
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import stableopt
from stableopt import Problem, StabilityMonitor, critical_sharpness
from stableopt.curvature import NonFiniteError
from stableopt.curvature.problem.problem import Problem as Plain


def test_along_a_step_it_is_a_quotient_below_the_sharpness() -> None:
    r"""Catches another direction or normalisation.

    On a quadratic :math:`\lambda_c = u^\top Hu/u^\top g`, for :math:`u = Pg` at most
    :math:`\lambda_{\max}(PH)`.
    """
    model, (x, y), hessian = quadratic()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        root = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, 4, generator=generator))
        model.zero_grad()
        half_squares(model(x), y).backward()
        gradient = model.weight.grad.reshape(-1)
        along = root**2 * gradient
        sharpness = critical_sharpness(model, half_squares, (x, y), direction=along)
        top = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
        # A line through two losses is exact on a quadratic, up to rounding over a twentieth.
        exact = float(along @ hessian @ along / (along @ gradient))
        assert sharpness.value == pytest.approx(exact, rel=1e-9)
        assert sharpness.value <= top * (1 + 1e-3)
        assert sharpness.converged
        assert sharpness.bracket[0] <= sharpness.lr <= sharpness.bracket[1]
        assert 1 - sharpness.bracket[0] / sharpness.bracket[1] < 1 / 16
        assert sharpness.passes <= 7


def test_along_the_top_direction_it_is_the_sharpness() -> None:
    """Catches a bias; the bracket alone is 6 % wide."""
    model, (x, y), hessian = quadratic(outputs=1)
    values, vectors = torch.linalg.eigh(hessian)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T + vectors[:, -1])
    for options in (
        {},
        {"direction": [values[-1] * vectors[None, :, -1]]},
        {"lr": 0.01},
        {"lr": 50.0},
    ):
        sharpness = critical_sharpness(model, half_squares, (x, y), **options)
        assert sharpness.value == pytest.approx(float(values[-1]), rel=0.07)
        assert sharpness.converged


def trained_cnn() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 6, 6)
    y = nn.functional.one_hot(torch.randint(3, (16,)), 3).float()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def test_on_a_trained_network_it_is_where_the_loss_rises_first() -> None:
    """Catches a crossing that is skipped: the oracle scans the loss in steps of 2 %."""
    model, (x, y) = trained_cnn()
    sharpness = critical_sharpness(model, nn.MSELoss(), (x, y))
    model.zero_grad()
    base = nn.functional.mse_loss(model(x), y)
    base.backward()
    weights = [p.detach().clone() for p in model.parameters()]
    eta, stepped = sharpness.lr / 10, copy.deepcopy(model)
    for _ in range(200):
        for p, w, q in zip(stepped.parameters(), weights, model.parameters(), strict=True):
            p.data.copy_(w - eta * q.grad)
        with torch.no_grad():
            if nn.functional.mse_loss(stepped(x), y) > base:
                break
        eta *= 1.02
    # Required accuracy; the bracket gives 6 %.
    assert sharpness.lr == pytest.approx(eta, rel=0.2)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam that maximizes", "Muon and AdamW"])
def test_an_optimizer_is_tried_and_left_as_it_is(name: str) -> None:
    """Catches a direction that is not the optimizer's next step, and a trace of the trial.

    The oracle takes the step, and puts weights and state back.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    _, (x, y), _ = quadratic()
    params = list(model.parameters())
    sign = -1.0 if "maximizes" in name else 1.0

    def loss_fn(outputs: Any, targets: Any) -> Any:
        return sign * half_squares(outputs, targets)

    optimizers: list[torch.optim.Optimizer] = {
        "SGD": lambda: [torch.optim.SGD(params, lr=0.1, momentum=0.9)],
        "AdamW": lambda: [torch.optim.AdamW(params, lr=0.02)],
        "Adam that maximizes": lambda: [torch.optim.Adam(params, lr=0.02, maximize=True)],
        "Muon and AdamW": lambda: [
            torch.optim.Muon(params[:1], lr=0.02),
            torch.optim.AdamW(params[1:], lr=0.02),
        ],
    }[name]()
    torch.optim.lr_scheduler.ConstantLR(optimizers[0])  # which wraps step

    def full_step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()

    for _ in range(3):
        full_step()
    before = [p.detach().clone() for p in params]
    gradients = [p.grad.clone() for p in params]
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    sharpness = critical_sharpness(model, loss_fn, (x, y), optimizer=optimizers)
    for p, b, g in zip(params, before, gradients, strict=True):
        assert torch.equal(p, b)
        assert torch.equal(p.grad, g)
    for optimizer, state in zip(optimizers, states, strict=True):
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    full_step()
    rate = max(g["lr"] for optimizer in optimizers for g in optimizer.param_groups)
    along = [(b - p.detach()) / rate for p, b in zip(params, before, strict=True)]
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    problem = Problem(model, loss_fn, (x, y)).transformed(sign=sign)
    expected = critical_sharpness(problem, direction=along, lr=rate)
    # Two brackets of the same crossing, each interpolated.
    assert sharpness.value == pytest.approx(expected.value, rel=0.01)


def test_a_reference_is_the_loss_that_counts() -> None:
    """Catches the step of the wrong loss: with steps along loss 1, loss 2 has another crossing."""
    model, (x, y), hessian = quadratic()
    half, full = Problem(model, half_squares, (x[:6], y[:6])), Problem(model, half_squares, (x, y))
    sharpness = critical_sharpness(half, reference=full)
    along, slope = half.gradient(), full.gradient()
    # The closed form on a quadratic.
    exact = float(along @ hessian @ along / (along @ slope))
    assert sharpness.value == pytest.approx(exact, rel=1e-9)
    with pytest.raises(TypeError, match=r"reference=.*expected a Problem"):
        critical_sharpness(half, reference=model)
    with pytest.raises(ValueError, match="over the same parameters"):
        critical_sharpness(half, reference=Problem(quadratic()[0], half_squares, (x, y)))


def test_directions_without_a_crossing_say_so() -> None:
    """Catches a value that looks like a measurement where the loss never rises, or only rises."""
    model, (x, y), _ = quadratic()
    half_squares(model(x), y).backward()
    uphill = critical_sharpness(model, half_squares, (x, y), direction=[-model.weight.grad])
    assert not uphill.converged
    assert uphill.bracket[0] == 0
    slope = nn.Linear(1, 1).double()
    data = torch.ones(2, 1).double(), torch.zeros(2, 1).double()
    endless = critical_sharpness(slope, lambda outputs, _: outputs.mean(), data, max_passes=9)
    assert (endless.converged, endless.bracket[1], endless.passes) == (False, math.inf, 9)


def test_what_cannot_be_measured_is_refused() -> None:
    """Catches errors that name neither the argument nor a remedy."""
    model, (x, y), _ = quadratic()

    def ask(**options: Any) -> None:
        critical_sharpness(model, half_squares, (x, y), **options)

    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="optimizer and direction"):
        ask(optimizer=sgd, direction=torch.ones(12))
    with pytest.raises(ValueError, match=r"direction has shape \(3,\)"):
        ask(direction=torch.ones(3))
    with pytest.raises(ValueError, match="direction has shapes"):
        ask(direction=[torch.ones(3)])
    with pytest.raises(ValueError, match="the step is zero"):
        ask(direction=torch.zeros(12))
    with pytest.raises(NonFiniteError, match="direction of the step is not finite"):
        ask(direction=torch.full((12,), math.nan))
    for name, value in (("tol", 1.0), ("tol", 0.0), ("max_passes", 1), ("lr", -1.0)):
        with pytest.raises(ValueError, match=f"{name}="):
            ask(**{name: value})
    with pytest.raises(TypeError, match=r"LBFGS cannot take a trial step.*pass direction="):
        ask(optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_monitor_measures_it_along_the_step_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the wrong point or step, a search that ignores its last result, and gradients.

    Forward passes are counted: at most seven, without a backward pass.
    """
    model, (x, y), hessian = quadratic()
    passes: list[bool] = []
    value = Plain.value

    def counted(self: Plain, *args: Any, **kwargs: Any) -> float:
        passes.append(True)
        return value(self, *args, **kwargs)

    def refused(*args: Any) -> None:
        raise AssertionError("a gradient")

    monkeypatch.setattr(Plain, "value", counted)
    monkeypatch.setattr(Plain, "loss_and_gradient", refused)
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    monitor = StabilityMonitor(
        optimizer, model, half_squares, (x, y), every=1, quantities=("critical_sharpness",)
    )
    for _ in range(6):
        optimizer.zero_grad()
        half_squares(model(x), y).backward()
        gradient = model.weight.grad.reshape(-1)
        passes.clear()
        optimizer.step()
        assert len(passes) <= 7
        result = monitor.margins["critical_sharpness"]
        exact = float(gradient @ hessian @ gradient / (gradient @ gradient))
        # Rounding of the losses, over a twentieth of their change.
        assert result.value == pytest.approx(exact, rel=1e-7)
        assert result.limit == pytest.approx(2 / 0.1)
        assert monitor.margins.critical_sharpness_ratio == pytest.approx(exact * 0.05, rel=1e-7)


@pytest.mark.parametrize("distance", [1e-3, 1e-4, 3e-5])
def test_near_a_minimum_with_loss_left_it_comes_from_two_gradients(distance: float) -> None:
    """Catches a crossing that is rounding: the loss, of 0.9, changes by 1e-7 to 1e-10 along the step."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(200, 5, generator=generator), torch.randn(200, 1, generator=generator)
    y = x.sum(1, keepdim=True) + noise
    hessian = 2 / 200 * x.double().T @ x.double()
    minimum = torch.linalg.lstsq(x.double(), y.double()).solution
    model, loss_fn = nn.Linear(5, 1, bias=False), nn.MSELoss()
    with torch.no_grad():
        model.weight.copy_((minimum + distance * torch.linalg.eigh(hessian)[1][:, 3:4]).T)
    gradient = hessian @ (model.weight.detach().double().T - minimum)
    exact = float(gradient.T @ hessian @ gradient / gradient.square().sum())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharpness = critical_sharpness(model, loss_fn, (x, y))
    quantities = ("critical_sharpness",)
    with StabilityMonitor(
        optimizer, model, loss_fn, (x, y), every=1, quantities=quantities
    ) as monitor:
        loss_fn(model(x), y).backward()
        optimizer.step()
    # Gradients of 6e-5 to 2e-3 have rounding errors of about 1e-6, of terms of size 1.
    assert sharpness.value == pytest.approx(exact, rel=0.02)
    assert monitor.margins.critical_sharpness == pytest.approx(exact, rel=0.02)
    assert sharpness.converged
    assert monitor.margins.converged
    assert sharpness.bracket == (0.0, math.inf)


def test_a_trial_step_is_not_counted_by_global_hooks() -> None:
    """Catches a trial step that torch's global hooks, such as a profiler's, count as a step."""
    model, data, _ = quadratic()
    steps: list[Any] = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: steps.append(optimizer)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    critical_sharpness(model, half_squares, data, optimizer=optimizer)
    hook.remove()
    assert steps == []


def test_a_trial_step_draws_no_random_numbers_of_training() -> None:
    """Catches an optimizer with noise of its own, whose trial step moves torch's generator."""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad + 0.01 * torch.randn_like(p), alpha=-0.1)

    model, data, _ = quadratic()
    before = torch.get_rng_state()
    critical_sharpness(model, half_squares, data, optimizer=Noisy(model.parameters(), lr=0.1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [None, 0.0])
def test_an_optimizer_may_move_without_a_rate(rate: float | None) -> None:
    """Catches a refusal of optimizers that find their own rate, as Adafactor with relative steps."""

    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": rate})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p -= 0.1 * p.grad

    model = nn.Linear(1, 1, bias=False).double()
    data = torch.ones(2, 1).double(), torch.zeros(2, 1).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its limit is not known
        found = critical_sharpness(model, nn.MSELoss(), data, optimizer=Own(model.parameters()))
    # The loss w^2 rises at the step 1 w = 10 times the optimizer's own.
    assert found.lr == pytest.approx(10.0, rel=1e-2)
