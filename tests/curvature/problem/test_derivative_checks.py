"""Checks of derivatives: the module whose second derivative is missing or wrong is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracles import small_data
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt
from stableopt.curvature import GaussNewton, Problem, SecondDerivativeError
from stableopt.curvature.errors import DifferenceError
from stableopt.curvature.problem import differentiable_loss
from stableopt.curvature.problem.derivatives import second_derivative
from stableopt.curvature.problem.derivatives.derivative_checks import check_gradient


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(x)


def test_a_module_without_second_derivative_is_named() -> None:
    """Catches an error of torch's that names no module, and one raised only in mid-training."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), Exponential()), nn.Linear(4, 3))
    x, y = small_data()
    problem = Problem(model.double(), nn.MSELoss(), (x, y))
    assert problem.method == "central differences"
    for refuse in (problem.check_twice, lambda: GaussNewton(problem)):
        with pytest.raises(SecondDerivativeError, match=r"module '1\.1' \(Exponential\)"):
            refuse()


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].detach()


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Detached.apply(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_with_a_wrong_derivative_is_found_out(dtype: torch.dtype) -> None:
    """Catches curvature that silently lacks a part: nothing raises, and only differences tell."""
    x, y = (t.to(dtype) for t in small_data())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), Silent()), nn.Linear(4, 3))
    problem = Problem(model.to(dtype), nn.MSELoss(), (x, y))
    with pytest.raises(SecondDerivativeError, match=r"module '1\.1' \(Silent\).* is off by"):
        problem.check_twice()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat models as large ones: one sample, their own precision, and sketches of gradients."""
    monkeypatch.setattr(differentiable_loss, "LARGE", 0)
    monkeypatch.setattr(differentiable_loss, "_MANY_BYTES", 0)
    monkeypatch.setattr(second_derivative, "_WHOLE", 8)


@pytest.mark.usefixtures("large")
def test_large_models_are_checked_on_one_sample_by_sketches() -> None:
    """Catches a check that is left out for them, or that refuses right derivatives."""
    x, y = (t.float() for t in small_data())
    torch.manual_seed(0)
    evaluated: list[tuple[int, torch.dtype]] = []

    def network(inner: nn.Module) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), inner), nn.Linear(4, 3))
        model.register_forward_hook(
            lambda _, args, __: evaluated.append((len(args[0]), args[0].dtype))
        )
        return model

    with pytest.raises(SecondDerivativeError, match=r"module '1\.1' \(Silent\).* is off by"):
        Problem(network(Silent()), nn.MSELoss(), (x, y)).check_twice()
    with pytest.raises(ValueError, match="the gradient is not the derivative"):
        Problem(network(Layer(Reversed.apply)), nn.MSELoss(), (x, y))
    evaluated.clear()
    Problem(network(nn.Identity()), nn.MSELoss(), (x, y)).check_twice()
    assert {dtype for _, dtype in evaluated} == {torch.float32}
    assert {size for size, _ in evaluated[-10:]} == {1}


def test_kinks_that_two_steps_agree_on_are_no_wrong_gradient() -> None:
    """Catches a refusal, as of a ReLU network at the edge of stability, because two differences agree
    by chance: here the slope is 1 at the point, and 0.95 on the average over either of them.
    """

    def kinked(point: Sequence[Tensor]) -> Tensor:
        distance = point[0].sum() - 1
        near, far = distance.clamp(-5e-5, 5e-5), distance.clamp(-1e-4, 1e-4)
        return 1 + near + 0.9 * (far - near) + 0.95 * (distance - far)

    check_gradient(kinked, [torch.ones(1, dtype=torch.float64)])


# -- wrong second derivatives ------------------------------------------------------------------------


class SavedGradient(torch.autograd.Function):
    """A cross entropy whose gradient is computed in forward and scaled in backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((z.softmax(-1) - F.one_hot(y, z.shape[1])) / len(z))
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class SavedGradientOnce(SavedGradient):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class SquareWithoutGraph(torch.autograd.Function):
    """x + x^2/10, whose backward runs without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + 0.1 * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            slope = 1 + 0.2 * ctx.saved_tensors[0]
        return grad * slope


class Layer(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class FixedPoint(nn.Module):
    """z = tanh(Wz + x), whose gradient a hook solves for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        def step(z: Tensor) -> Tensor:
            return torch.tanh(z @ self.weight.T + x)

        with torch.no_grad():
            fixed = torch.zeros_like(x)
            for _ in range(60):
                fixed = step(fixed)
        start = fixed.clone().requires_grad_()
        mapped, z = step(start), step(fixed)

        def solve(grad: Tensor) -> Tensor:
            solution = grad
            for _ in range(60):
                solution = torch.autograd.grad(mapped, start, solution, retain_graph=True)[0] + grad
            return solution

        z.register_hook(solve)
        return z


CROSS_ENTROPY = nn.CrossEntropyLoss()

WRONG: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a gradient saved in forward": (nn.Identity, SavedGradient.apply),
    "the same, once differentiable": (nn.Identity, SavedGradientOnce.apply),
    "a layer's slope saved in forward": (Silent, CROSS_ENTROPY),
    "a backward without a graph": (lambda: Layer(SquareWithoutGraph.apply), CROSS_ENTROPY),
    "an implicit layer by hooks": (FixedPoint, CROSS_ENTROPY),
}


def convolutional(activation: type[nn.Module], pool: nn.Module, layer: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        activation(),
        pool,
        nn.Conv2d(4, 4, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(36, 6),
        layer,
        nn.Linear(6, 4),
    )


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", ["tanh", "ReLU", "max-pool"])
def test_no_kink_hides_a_wrong_second_derivative(
    setting: str, dtype: torch.dtype, kind: str
) -> None:
    """Catches curvature that lacks a part behind ReLU or max-pool, where long steps disagree."""
    torch.manual_seed(0)
    make, loss = WRONG[kind]
    activation = nn.Tanh if setting == "tanh" else nn.ReLU
    pool = nn.MaxPool2d(2) if setting == "max-pool" else nn.AvgPool2d(2)
    model = convolutional(activation, pool, make()).to(dtype)
    data = torch.randn(16, 1, 12, 12, dtype=dtype), torch.randint(4, (16,))
    problem = Problem(model, loss, data)
    assert problem.obstacle is not None
    assert problem.kinked or setting == "tanh"


class OwnReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0] > 0)


class OwnSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 1.0)
    return x


def in_single(x: Tensor) -> Tensor:
    """Normalise in single precision, as language models do."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "function", [OwnReLU.apply, OwnSwish.apply, hooked, in_single, F.hardswish]
)
def test_honest_networks_are_not_refused(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Catches a refusal at a kink, such as zero biases behind a blank part of an image, of a custom
    function whose backward is right, or of rounding inside the model.
    """
    torch.manual_seed(0)
    model = convolutional(nn.ReLU, nn.MaxPool2d(2), Layer(function)).to(dtype)
    for layer in (model[0], model[3]):
        nn.init.zeros_(layer.bias)
    x, y = torch.randn(16, 1, 12, 12, dtype=dtype), torch.randint(4, (16,))
    x[..., :5] = 0
    assert Problem(model, CROSS_ENTROPY, (x, y)).obstacle is None


def test_a_second_derivative_that_is_no_number_is_found() -> None:
    """Catches NaN, which passes every comparison with a bound: here that of a norm at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh()).double()
    x = small_data()[0]
    x[0] = 0

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return z.norm(dim=1).mean()

    problem = Problem(model, loss, (x, torch.zeros(len(x))))
    with pytest.raises(SecondDerivativeError, match="second derivative is not finite"):
        problem.check_twice()


def test_a_custom_function_that_cannot_be_checked_is_not_trusted() -> None:
    """Catches a function that is trusted because it cannot be checked: behind ReLU, in float32
    only.
    """

    def single(z: Tensor, y: Tensor) -> Tensor:
        if z.dtype != torch.float32:
            raise TypeError("this kernel takes float32")
        return SavedGradient.apply(z, y)

    torch.manual_seed(0)
    model = convolutional(nn.ReLU, nn.MaxPool2d(2), nn.Identity())
    data = torch.randn(16, 1, 12, 12), torch.randint(4, (16,))
    problem = Problem(model, single, data)
    assert problem.obstacle is not None
    with pytest.raises(DifferenceError, match="evaluated in double precision"):
        stableopt.measure(problem, lr=0.1, quantities=("sharpness",))


# -- gradients that are not the derivative --------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def rounded(x: Tensor) -> Tensor:
    return x + ((x * 8).round() / 8 - x).detach()


@pytest.mark.parametrize("function", [Reversed.apply, rounded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reversed_and_straight_through_gradients_are_refused_in_every_draw(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Catches a wrong gradient behind ReLU that is refused for only some draws of the weights."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Layer(function), nn.Linear(32, 4))
        data = torch.randn(32, 8, dtype=dtype), torch.randint(4, (32,))
        with pytest.raises(ValueError, match="the gradient is not the derivative of the loss"):
            Problem(model.to(dtype), CROSS_ENTROPY, data)


class Adjoint(torch.autograd.Function):
    """Euler steps of dz/dt = f(z), with the adjoint equation solved backwards in time."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, steps: int, z: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(steps):
                z = z + f(z) / steps
        ctx.f, ctx.steps = f, steps
        ctx.save_for_backward(z, *params)
        return z

    @staticmethod
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        z, *params = ctx.saved_tensors
        slopes = [torch.zeros_like(p) for p in params]
        for _ in range(ctx.steps):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                velocity = ctx.f(z)
                products = torch.autograd.grad(
                    velocity, (z, *params), adjoint.detach(), allow_unused=True
                )
            slopes = [
                total if g is None else total + g / ctx.steps
                for total, g in zip(slopes, products[1:], strict=True)
            ]
            z, adjoint = z - velocity.detach() / ctx.steps, adjoint + products[0] / ctx.steps
        return None, None, adjoint, *slopes


class Recomputed(torch.autograd.Function):
    """The same steps, computed once more in backward and differentiated: the gradient is exact."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, steps: int, z: Tensor, *params: Tensor) -> Tensor:
        ctx.f, ctx.steps = f, steps
        ctx.save_for_backward(z)
        for _ in range(steps):
            z = z + f(z) / steps
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            start = z = ctx.saved_tensors[0].detach().requires_grad_()
            for _ in range(ctx.steps):
                z = z + ctx.f(z) / ctx.steps
            slopes = torch.autograd.grad(z, (start, *ctx.f.parameters()), grad)
        return None, None, *slopes


class Flow(nn.Module):
    def __init__(self, function: type[torch.autograd.Function] | None, steps: int) -> None:
        super().__init__()
        self.velocity = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.function, self.steps = function, steps

    def forward(self, z: Tensor) -> Tensor:
        if self.function is not None:
            return self.function.apply(self.velocity, self.steps, z, *self.velocity.parameters())
        for _ in range(self.steps):
            z = z + self.velocity(z) / self.steps
        return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_that_runs_the_model_has_the_parameters_of_its_forward_pass(
    dtype: torch.dtype,
) -> None:
    """Catches a backward that takes the model's parameters although differences displace them, or
    that is zero for copies of them. Both lose curvature, and only behind a custom function.
    """
    torch.manual_seed(0)
    data = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    quantities = ("sharpness", "non_uniformity")
    plain, recomputed = Flow(None, 4).to(dtype), Flow(Recomputed, 4).to(dtype)
    recomputed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        before = [p.clone() for p in recomputed.parameters()]
    expected, measured = (
        stableopt.measure(m, nn.MSELoss(), data, batch_size=1, lr=0.1, quantities=quantities)
        for m in (plain, recomputed)
    )
    assert measured.method.startswith("central differences")
    # Both searches stop at a residual of 1e-3; differences in single precision are 1e-4 off.
    assert measured.sharpness == pytest.approx(expected.sharpness, rel=1e-3)
    assert measured.non_uniformity == pytest.approx(expected.non_uniformity, rel=1e-3)
    assert all(map(torch.equal, before, recomputed.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adjoint_method_that_is_not_the_derivative_is_refused(dtype: torch.dtype) -> None:
    """Catches curvature up to 5 % off in single precision: few steps leave an error of some percent."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), Flow(Adjoint, 4), nn.Linear(3, 3)).to(dtype)
        x, y = (t.to(dtype) for t in small_data())
        with pytest.raises(ValueError, match="differentiate through the solver's steps"):
            Problem(model, nn.MSELoss(), (x, y))


def test_parameters_that_are_detached_or_masked_are_constants() -> None:
    """Catches a refusal of a frozen backbone, or of the padding row of an embedding."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 4, padding_idx=0)
    backbone = Layer(lambda x: x.detach())
    nn.init.normal_(embedding.weight)
    tokens, y = torch.randint(5, (16, 3)), torch.randint(4, (16,))
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 4))
    assert Problem(model, CROSS_ENTROPY, (tokens, y)).obstacle is None
    probe = nn.Sequential(embedding, nn.Flatten(), backbone, nn.Linear(12, 4))
    assert Problem(probe, CROSS_ENTROPY, (tokens, y)).obstacle is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_lost_in_rounding_is_no_wrong_gradient(dtype: torch.dtype) -> None:
    """Catches a refusal of separable data fitted so well that the loss no longer moves."""
    x, y = torch.tensor([[1.0], [-1.0]], dtype=dtype), torch.tensor([0, 1])
    model = nn.Linear(1, 2, bias=False).to(dtype)
    for scale in (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0):
        with torch.no_grad():
            model.weight.copy_(scale * x)
        assert Problem(model, CROSS_ENTROPY, (x, y)).obstacle is None
