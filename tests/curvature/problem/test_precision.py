"""The precision of a measurement is the user's choice, ``dtype=``, and never autocast's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_models import MSE, Autocast, mlp, pair
from oracles import covariance, dense_hessians, relative_error
from torch import Tensor, nn

import stableopt
from stableopt.curvature import DualCurvature, Hessian, NonUniformity, Problem

pytestmark = pytest.mark.usefixtures("double_by_default")


def sharpness(model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> float:
    margins = stableopt.measure(model, MSE, data, quantities=("sharpness",), tol=1e-5, **options)
    assert margins.sharpness is not None
    return margins.sharpness


def test_autocast_is_a_choice() -> None:
    """Catches bfloat16 in a measurement by default, and a ``dtype=`` that is ignored.

    bfloat16 rounds to 4e-3, so the two differ by more than single precision does, and by less than a
    tenth.
    """
    torch.manual_seed(0)
    model = Autocast().float()
    data = tuple(t.float() for t in pair(20))
    plain = sharpness(model.inner, data)
    assert sharpness(model, data) == pytest.approx(plain, rel=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sharpness(model, data) == pytest.approx(plain, rel=1e-6)
    chosen = sharpness(model.inner, data, dtype=torch.bfloat16)
    assert 1e-4 < abs(chosen / plain - 1) < 0.1
    assert sharpness(model, data, dtype=torch.bfloat16) == pytest.approx(chosen, rel=1e-6)
    problem = Problem(model, MSE, data, dtype=torch.bfloat16)
    assert problem.method == "double backward, under autocast to bfloat16"


def test_a_dtype_that_is_none_is_refused() -> None:
    """Catches an integer or half-precision dtype that is accepted."""
    model, data = mlp(), pair()
    with pytest.raises(ValueError, match=r"dtype=torch.int64: expected torch.float32"):
        Problem(model, MSE, data, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"'0.weight' has dtype torch.bfloat16"):
        Problem(model.bfloat16(), MSE, data, dtype=torch.bfloat16)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator, with its complex weights or with their real view."""

    def __init__(self, *, real: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.head = nn.Linear(1, 2), nn.Linear(2, 1)
        weight = torch.randn(2, 2, 3, dtype=torch.complex128) / 2
        self.weight = nn.Parameter(torch.view_as_real(weight) if real else weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        h = torch.tanh(self.lift(x)).mT
        modes = torch.einsum("bik,iok->bok", torch.fft.rfft(h)[..., :3], weight)
        return self.head(torch.tanh(h + torch.fft.irfft(modes, n=h.shape[-1])).mT)


def waves() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 3, 30).view(5, 6, 1)
    return x.sin(), (2 * x).cos()


def test_complex_parameters_are_measured_through_their_real_view() -> None:
    """Catches a refusal, or a product that mixes real and imaginary parts: against dense Hessians of
    the real view, and the Gram matrix of the model that holds it.
    """
    model, twin, data = Spectral(), Spectral(real=True), waves()
    problem, twin_problem = (Problem(m, MSE, data) for m in (model, twin))
    hessians = dense_hessians(twin, MSE, *data)
    v = torch.ones(problem.num_params)
    for method in ("auto", "vmap", "loop"):
        sigma = NonUniformity(problem, method=method) @ v
        assert relative_error(sigma, covariance(hessians) @ v) < 1e-13
    assert relative_error(Hessian(problem) @ v, hessians.mean(0) @ v) < 1e-13
    grams = [DualCurvature.from_problem(p).gram for p in (problem, twin_problem)]
    assert relative_error(*grams) < 1e-13
    assert problem.gradient() == pytest.approx(twin_problem.gradient(), abs=1e-14)
    single = Spectral()
    single.weight = nn.Parameter(model.weight.detach().to(torch.complex64))
    single.lift.float(), single.head.float()
    x, y = data
    for dtype, tolerance in ((None, 1e-5), (torch.float64, 1e-6)):  # the weights' own rounding
        rough = Problem(single, MSE, (x.float(), y.float()), dtype=dtype)
        product = (Hessian(rough) @ v.to(rough.dtype)).double()
        assert relative_error(product, hessians.mean(0) @ v) < tolerance


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "LBFGS"])
def test_optimizers_of_complex_parameters_are_those_of_the_real_view(name: str) -> None:
    """Catches second moments read as complex numbers, which torch keeps for the real view."""
    sharpnesses = []
    for real in (False, True):
        model, (x, y) = Spectral(real=real), waves()
        options = {"max_iter": 3} if name == "LBFGS" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)

        def closure(model=model, optimizer=optimizer, x=x, y=y) -> Tensor:
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        margins = stableopt.measure(model, MSE, (x, y), optimizer=optimizer, tol=1e-7)
        sharpnesses.append((margins.sharpness, margins.preconditioned_sharpness or 0.0))
    assert sharpnesses[0] == pytest.approx(sharpnesses[1], rel=1e-10)


def test_tensors_that_the_loss_holds_follow_double_precision() -> None:
    """Catches a cast that stops at the loss's own tensors, which torch then refuses to mix."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4).float(), torch.randn(9, 3).float(), torch.arange(9) % 4
    weight, mixing = torch.rand(4).float(), torch.randn(4, 4).float()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs @ mixing, targets, weight=weight)

    def loss_in_double(outputs: Tensor, targets: Tensor) -> Tensor:
        w = weight.double()
        return nn.functional.cross_entropy(outputs @ mixing.double(), targets, weight=w)

    problem, expected = (
        Problem(model, function, (x, y), dtype=torch.float64) for function in (loss, loss_in_double)
    )
    v = torch.ones(problem.num_params)
    for operator in (Hessian, NonUniformity):
        assert relative_error(operator(problem) @ v, operator(expected) @ v) < 1e-13
    with pytest.raises(
        ValueError, match=r"dtype=torch.float32 casts .* not the tensors .* loss_fn"
    ):
        Problem(model.double(), loss_in_double, (x.double(), y), dtype=torch.float32)


def test_parameters_of_two_precisions_are_measured_in_the_better_one() -> None:
    """Catches a message without the remedy: dtype=torch.float64."""
    model = nn.Sequential(nn.Linear(3, 4).float(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"dtype=torch\.float64 casts all of them"):
        Problem(model, MSE, pair())
