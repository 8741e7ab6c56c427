"""Checks of derivatives: the module whose second derivative is missing or wrong is named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from oracles import small_data
from torch import Tensor, nn

from stableopt.curvature import GaussNewton, Problem, SecondDerivativeError
from stableopt.curvature.problem.derivative_checks import check_gradient


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


def test_kinks_that_two_steps_agree_on_are_no_wrong_gradient() -> None:
    """Catches a refusal, as of a ReLU network at the edge of stability, because two differences agree
    by chance: here the slope is 1 at the point, and 0.95 on the average over either of them.
    """

    def kinked(point: Sequence[Tensor]) -> Tensor:
        away = point[0].sum() - 1
        near, far = away.clamp(-5e-5, 5e-5), away.clamp(-1e-4, 1e-4)
        return 1 + near + 0.9 * (far - near) + 0.95 * (away - far)

    assert check_gradient(kinked, [torch.ones(1, dtype=torch.float64)])
