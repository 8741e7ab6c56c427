"""The precision of a measurement is the user's choice, ``dtype=``, and never autocast's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile_models import MSE, Autocast, mlp, pair
from oracles import relative_error
from torch import Tensor, nn

import stableopt
from stableopt.curvature import Hessian, NonUniformity, Problem

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
    """Catches whole numbers, and half precision that parameters are not to be cast to."""
    model, data = mlp(), pair()
    with pytest.raises(ValueError, match=r"dtype=torch.int64: expected torch.float32"):
        Problem(model, MSE, data, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"'0.weight' has dtype torch.bfloat16"):
        Problem(model.bfloat16(), MSE, data, dtype=torch.bfloat16)


class Waves(nn.Module):
    """Complex weights held as real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(torch.randn(3, 2, dtype=torch.complex128)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ torch.view_as_complex(self.weight)).abs()


def test_the_real_view_of_complex_weights_is_measured() -> None:
    """Catches a way out that leads nowhere: the message names it.

    1e-6: a tolerance of 1e-5 enters the value squared, over the gap between the eigenvalues.
    """
    torch.manual_seed(0)
    model, data = Waves(), pair(20)

    def loss(flat: Tensor) -> Tensor:
        weight = torch.view_as_complex(flat.view(3, 2, 2))
        return MSE((data[0].to(torch.complex128) @ weight).abs(), data[1])

    dense = torch.autograd.functional.hessian(loss, model.weight.detach().reshape(-1))
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    assert sharpness(model, data) == pytest.approx(largest, rel=1e-6)


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

    found, expected = (
        Problem(model, function, (x, y), dtype=torch.float64) for function in (loss, loss_in_double)
    )
    v = torch.ones(found.num_params)
    for operator in (Hessian, NonUniformity):
        assert relative_error(operator(found) @ v, operator(expected) @ v) < 1e-13
    with pytest.raises(
        ValueError, match=r"dtype=torch.float32 casts .* not the tensors .* loss_fn"
    ):
        Problem(model.double(), loss_in_double, (x.double(), y), dtype=torch.float32)


def test_parameters_of_two_precisions_are_measured_in_the_better_one() -> None:
    """Catches a message that leaves out the way: dtype=torch.float64."""
    model = nn.Sequential(nn.Linear(3, 4).float(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"dtype=torch\.float64 measures all of them"):
        Problem(model, MSE, pair())
