"""Plain twins of torch's kernels: their values and derivatives."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_hessians, relative_error, small_data
from torch import Tensor, nn
from torch.nn import functional as F

from stableopt.curvature import GaussNewton, Hessian, Problem
from stableopt.curvature.isolation.isolated import isolated


class PlainHardsigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)


class SqueezeExcite(nn.Module):
    """A gate by a hard sigmoid, as in MobileNetV3."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.gate = nn.Linear(5, 5), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(3 * self.reduce(x))


def network(gate: nn.Module, activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), activation, SqueezeExcite(gate), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("inplace", [False, True])
def test_hard_sigmoid_and_hard_swish_are_differentiated_twice(inplace: bool) -> None:
    """Catches wrong second derivatives, or a refusal, where torch only lacks the formula.

    1e-12: rounding of products of 63 terms in float64.
    """
    model = network(nn.Hardsigmoid(inplace), nn.Hardswish(inplace))
    plain, data = network(PlainHardsigmoid(), nn.Hardswish()), small_data()
    problem = Problem(model, nn.MSELoss(), data)
    assert problem.method == "double backward"
    identity = torch.eye(problem.num_params, dtype=torch.float64)
    expected = dense_hessians(plain, nn.MSELoss(), *data).mean(0)
    assert relative_error(Hessian(problem) @ identity, expected) < 1e-12
    twin = GaussNewton(Problem(plain, nn.MSELoss(), data)) @ identity
    assert relative_error(GaussNewton(problem) @ identity, twin) < 1e-12


def test_the_hard_sigmoid_is_torch_s_own_outside_and_equal_inside() -> None:
    """Catches a kernel that stays replaced, and a twin with other values.

    1e-15: a few roundings of numbers up to 1.
    """
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch_kernel = torch._C._nn.hardsigmoid
    outside = F.hardsigmoid(x)
    with isolated(nn.Identity(), torch.device("cpu")):
        torch.testing.assert_close(F.hardsigmoid(x), outside, rtol=0, atol=1e-15)
    assert torch._C._nn.hardsigmoid is torch_kernel
