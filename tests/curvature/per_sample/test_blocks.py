"""Per-sample Hessians in a few directions against dense ones, and the part that is not Gauss–Newton."""

from __future__ import annotations

import pytest
import torch
from oracles import LOSSES, dense_gauss_newtons, dense_hessians, small_data, small_network
from torch import Tensor, nn

from stableopt.curvature import Problem
from stableopt.curvature.per_sample.blocks import hessian_blocks, residual_share

# Sums of a few dozen products in float64.
ROUNDING = 1e-12


def targets(loss_fn: nn.Module, y: Tensor) -> Tensor:
    return y.argmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y


def squares(matrices: Tensor) -> Tensor:
    """Return the mean of the squared matrices ``(n, d, d)``."""
    return (matrices @ matrices).mean(0)


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: type(loss_fn).__name__)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_blocks_and_share_are_those_of_dense_matrices(
    loss_fn: nn.Module, chunk_size: int | None
) -> None:
    """Catches samples out of order, a transposed block, and a residual part that is taken of the mean,
    in which it may cancel.
    """
    model, (x, y) = small_network(), small_data()
    y = targets(loss_fn, y)
    problem = Problem(model, loss_fn, (x, y), chunk_size=chunk_size)
    hessians = dense_hessians(model, loss_fn, x, y)
    residuals = hessians - dense_gauss_newtons(model, loss_fn, x, y)
    generator = torch.Generator().manual_seed(2)
    basis = torch.randn(problem.num_params, 4, generator=generator, dtype=torch.float64)
    blocks = hessian_blocks(problem, basis)
    assert torch.allclose(blocks, basis.T @ hessians @ basis, rtol=ROUNDING, atol=ROUNDING)
    q = torch.linalg.qr(basis).Q
    share = (largest(q.T @ squares(residuals) @ q) / largest(q.T @ squares(hessians) @ q)) ** 0.5
    assert residual_share(problem, q) == pytest.approx(share, rel=1e-9)
    # The power method ends a little below the largest value.
    eye = torch.eye(problem.num_params).double()
    exact = (largest(squares(residuals)) / largest(squares(hessians))) ** 0.5
    found = residual_share(problem, eye, start=basis[:, 0])
    assert 0.8 * exact <= found <= exact * (1 + 1e-9)


def test_scaled_coordinates_and_weight_decay() -> None:
    """Catches coordinates that the blocks miss, and decay that is counted here and by the rule."""
    model, (x, y) = small_network(), small_data()
    scale = [2.0, 0.5, 1.0, 3.0]
    problem = Problem(model, nn.MSELoss(), (x, y)).transformed(
        sign=-1.0, scale=scale, weight_decay=[0.3] * 4
    )
    d = torch.cat(
        [torch.full((k,), f) for k, f in zip((15, 5, 15, 3), scale, strict=True)]
    ).double()
    expected = -(d[:, None] * dense_hessians(model, nn.MSELoss(), x, y) * d)
    eye = torch.eye(problem.num_params, dtype=torch.float64)
    assert torch.allclose(hessian_blocks(problem, eye), expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_module_that_vmap_fails_on() -> None:
    """Catches samples that are lost, or differ, where they are taken one by one."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            # vmap refuses a branch that depends on the data.
            sign = 1.0 if float(x.detach().sum()) > 1e9 else 2.0
            return sign * (x * self.weight**2).sum(1, keepdim=True)

    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    y = torch.ones(3, 1, dtype=torch.float64)
    model = Branching()
    problem = Problem(model, nn.MSELoss(), (x, y))
    hessians = dense_hessians(model, nn.MSELoss(), x, y)
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(hessian_blocks(problem, eye), hessians, rtol=ROUNDING)
    residuals = hessians - dense_gauss_newtons(model, nn.MSELoss(), x, y)
    expected = (largest(squares(residuals)) / largest(squares(hessians))) ** 0.5
    assert residual_share(problem, eye) == pytest.approx(expected, rel=1e-10)


def test_samples_that_are_fitted_have_no_residual_part() -> None:
    """Catches a share that depends on the loss: none at fitted samples, none in a linear model."""
    model, (x, y) = small_network(), small_data()
    eye = torch.eye(38, dtype=torch.float64)
    fitted = Problem(model, nn.MSELoss(), (x, model(x).detach()))
    assert residual_share(fitted, eye) == 0
    assert residual_share(fitted, eye, start=eye.sum(1)) == 0
    linear = nn.Linear(3, 3).double()
    assert residual_share(Problem(linear, nn.MSELoss(), (x, y)), eye[:12, :12]) == 0


def test_a_batch_loss_has_no_known_outputs() -> None:
    """Catches a guess where outputs and loss are one."""
    model, (x, y) = small_network(), small_data()
    problem = Problem.from_batch_loss(
        model, lambda model, batch: nn.MSELoss()(model(batch["x"]), batch["y"]), {"x": x, "y": y}
    )
    with pytest.raises(ValueError, match=r"Problem\(model, loss_fn, data\)"):
        residual_share(problem, torch.ones(38, 1, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_the_share_in_single_precision_does_not_depend_on_the_scale(scale: float) -> None:
    """Catches squares that single precision does not hold: a share of 0, or one that is not a number."""
    model, (x, y) = small_network().float(), (t.float() for t in small_data())

    def share(factor: float) -> float:
        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return factor * (outputs - targets).square().mean()

        problem = Problem(model, loss, (x, y))
        eye = torch.eye(problem.num_params)
        return residual_share(problem, eye[:, :3], start=eye[:, 0])

    assert share(scale) == pytest.approx(share(1.0), rel=1e-4)
