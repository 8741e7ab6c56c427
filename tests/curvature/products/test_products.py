"""Products of the Hessian and of Gauss–Newton against dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import (
    LOSSES,
    PRODUCT,
    dense_hessians,
    eye,
    relative_error,
    small_data,
    small_network,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Problem,
)


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: type(f).__name__)
def test_hessian_is_the_mean_of_the_dense_per_sample_hessians(
    network: nn.Module, data: tuple[Tensor, Tensor], loss_fn: nn.Module
) -> None:
    """Catches a wrong weight of a sample, a missing term of the second derivative, a transposition."""
    x, y = data
    y = y.softmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    hessian = Hessian(Problem(network, loss_fn, (x, y)))
    expected = dense_hessians(network, loss_fn, x, y).mean(0)
    assert relative_error(hessian @ eye(hessian), expected) < PRODUCT


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: type(f).__name__)
def test_gauss_newton_is_the_jacobian_sandwich(
    network: nn.Module, data: tuple[Tensor, Tensor], loss_fn: nn.Module
) -> None:
    """Catches the Hessian reported as Gauss–Newton: here the residuals are far from zero."""
    x, y = data
    y = y.softmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    operator = GaussNewton(Problem(network, loss_fn, (x, y)))
    parameters = list(network.parameters())
    expected = torch.zeros(operator.shape, dtype=torch.float64)
    for i in range(len(x)):
        out = network(x[i : i + 1])
        rows = [torch.autograd.grad(o, parameters, retain_graph=True) for o in out[0]]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        bend = torch.autograd.functional.hessian(
            lambda z, i=i: loss_fn(z, y[i : i + 1]), out.detach()
        ).reshape(3, 3)
        expected += jacobian.T @ bend @ jacobian / len(x)
    assert relative_error(operator @ eye(operator), expected) < PRODUCT
    full = dense_hessians(network, loss_fn, x, y).mean(0)
    assert relative_error(expected, full) > 1e-2


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NonUniformity])
def test_chunks_do_not_change_the_matrix(
    network: nn.Module, data: tuple[Tensor, Tensor], kind: type, chunk_size: int
) -> None:
    """Catches ragged chunks weighted by their number instead of their samples, and a kept graph
    of only one of several chunks.
    """
    unchunked = kind(Problem(network, nn.MSELoss(), data))
    chunked = kind(Problem(network, nn.MSELoss(), data, chunk_size=chunk_size))
    expected = unchunked @ eye(unchunked)
    for _ in range(2):  # the second product uses the cache of the first
        assert relative_error(chunked @ eye(unchunked), expected) < PRODUCT


def test_an_operator_is_a_snapshot(problem: Problem, network: nn.Module) -> None:
    """Catches a kept graph that mixes the parameters of two steps."""
    hessian = Hessian(problem)
    before = hessian @ eye(hessian)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
            p.data.add_(0.1)
    assert torch.equal(hessian @ eye(hessian), before)
    assert relative_error(Hessian(problem) @ eye(hessian), before) > 1e-2


def test_single_precision_agrees(data: tuple[Tensor, Tensor]) -> None:
    """Catches a step in float32 that cancels. 1e-5: some hundred roundings of 6e-8."""
    network, (x, y) = small_network(), data
    single = copy.deepcopy(network).float()
    v = torch.randn(38, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in (Hessian, GaussNewton, NonUniformity):
        exact = kind(Problem(network, nn.MSELoss(), data)) @ v
        rough = kind(Problem(single, nn.MSELoss(), (x.float(), y.float()))) @ v.float()
        assert rough.dtype == torch.float32
        assert relative_error(rough.double(), exact) < 1e-5


def test_products_refuse_what_does_not_fit(problem: Problem) -> None:
    """Catches broadcasting of a vector of the wrong length, dtype or device."""
    hessian = Hessian(problem)
    with pytest.raises(ValueError, match=r"expected \(38,\) or \(38, k\)"):
        hessian @ torch.zeros(37, dtype=torch.float64)
    with pytest.raises(ValueError, match="float32"):
        hessian @ torch.zeros(38)
    with pytest.raises(ValueError, match="on meta"):
        hessian @ torch.zeros(38, dtype=torch.float64, device="meta")
    assert (hessian @ torch.zeros(38, 0, dtype=torch.float64)).shape == (38, 0)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_measured_rightly(dim: int | None) -> None:
    """Catches the second derivative of torch's fused weight norm, off by tens of percent in torch
    2.13: whichever way is taken must agree with differences of the gradient. The fused one stays
    outside a measurement.
    """
    torch.manual_seed(0)
    fused = torch._weight_norm
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3), dim=dim).double()
    data = small_data()
    hessian = Hessian(Problem(model, nn.MSELoss(), data))
    assert torch._weight_norm is fused
    assert hessian.problem.method == "double backward"
    point = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def gradient(params: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(params, model.parameters())
        return Problem(model, nn.MSELoss(), data).gradient()

    step = 1e-6
    for unit in eye(hessian):
        expected = (gradient(point + step * unit) - gradient(point - step * unit)) / (2 * step)
        assert float((hessian @ unit - expected).norm()) < 1e-6


def test_attention_is_measured() -> None:
    """Catches attention kernels that have no double backward: the math kernel has."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 12).double()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).chunk(3, dim=-1)
            return nn.functional.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    x = torch.randn(5, 1, 6, 4, dtype=torch.float64)
    model = Attend()
    with sdpa_kernel(SDPBackend.MATH):
        expected = dense_hessians(model, nn.MSELoss(), x, x).mean(0)
    hessian = Hessian(Problem(model, nn.MSELoss(), (x, x)))
    assert relative_error(hessian @ eye(hessian), expected) < PRODUCT
