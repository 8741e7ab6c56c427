"""Tests of `sample_rows`: outputs without a second dimension, models that differentiate in forward."""

from __future__ import annotations

import pytest
import torch
from oracles import dense_hessians
from torch import Tensor, nn

import stableopt
from stableopt.curvature import DualCurvature, Problem


class Flat(nn.Module):
    """Returns `(n,)`; with ``inner``, through layers that `layer_gram` does not cover."""

    def __init__(self, generic: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1).double()
        self.scale = nn.Parameter(torch.ones(1).double()) if generic else None

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.linear(x).squeeze(-1)
        return outputs if self.scale is None else outputs * self.scale


class Forces(nn.Module):
    """Returns the negative gradient of an energy in the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize(("generic", "classes"), [(False, False), (True, False), (False, True)])
def test_outputs_without_a_second_dimension(generic: bool, classes: bool) -> None:
    """Catches a second axis that is taken for granted: IndexError for binary classifiers."""
    torch.manual_seed(0)
    model, x = Flat(generic), torch.randn(12, 4).double()
    # Interpolation, or a loss without curvature times residual: G_i is then H_i.
    y = (torch.rand(12) > 0.5).double() if classes else model(x).detach()
    loss_fn = nn.BCEWithLogitsLoss() if classes else nn.MSELoss()
    problem = Problem(model, loss_fn, (x, y))
    mean = dense_hessians(model, loss_fn, x, y).mean(0)
    sharpness = DualCurvature.from_problem(problem).sharpness
    # Rounding of a few dozen operations in double precision.
    assert sharpness == pytest.approx(float(torch.linalg.eigvalsh(mean)[-1]), rel=1e-10)
    assert stableopt.critical_lr(problem, batch_size=12).value == pytest.approx(2 / sharpness)
    stableopt.critical_batch_size(problem, lr=0.01)


def test_a_model_that_differentiates_in_forward() -> None:
    """Catches outputs that are computed without gradients: forces are then refused."""
    torch.manual_seed(0)
    model, x = Forces(), torch.randn(6, 2).double()
    y = model(x).detach()
    problem = Problem(model, nn.MSELoss(), (x, y))
    mean = dense_hessians(model, nn.MSELoss(), x, y).mean(0)
    # Rounding of a few dozen operations in double precision.
    expected = pytest.approx(float(torch.linalg.eigvalsh(mean)[-1]), rel=1e-8)
    assert DualCurvature.from_problem(problem).sharpness == expected
