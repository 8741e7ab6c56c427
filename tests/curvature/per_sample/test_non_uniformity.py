"""The covariance of per-sample Gauss–Newton matrices and of preconditioned Hessians."""

from __future__ import annotations

import pytest
import torch
from hidden import HiddenGain
from oracles import (
    Dense,
    covariance,
    dense_gauss_newtons,
    dense_hessians,
    relative_error,
    small_data,
    small_network,
)
from torch import Tensor, nn

from stableopt.curvature import NonUniformity, Problem, top_eigenpair
from stableopt.curvature.gram import dense as dense_rows


class Blocks(nn.Module):
    """A convolution, a norm, a gain of no known kind, and a linear map: one of each way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Linear(3, 8)
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.PReLU(3)
        self.head = nn.Linear(9, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(torch.tanh(self.lift(x)).view(-1, 2, 4))
        return self.head(self.gain(self.norm(maps)).tanh().flatten(1))


class Shared(nn.Module):
    """Uses a bias in a custom function, so that no structure holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return HiddenGain.apply(torch.tanh(self.layer(x)), self.layer.bias)


LOSSES = {
    "squared": (nn.MSELoss(), small_data()[1]),
    "cross-entropy": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 0, 1, 2, 2])),
    "binary": (nn.BCEWithLogitsLoss(), (small_data()[1] > 0).double()),
}


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("build", [small_network, Blocks, Shared])
def test_gauss_newton_against_dense(
    build, loss: str, chunk_size: int | None, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the scale of a mean over chunks in L, a head's cotangent where Gauss–Newton has none,
    an offset that a way forgets, and rows of another mean than the passes'.
    """
    if not few:
        monkeypatch.setattr(dense_rows, "_NUMBERS", 0)
    network, x = build(), small_data()[0]
    loss_fn, y = LOSSES[loss]
    operator = NonUniformity(
        Problem(network, loss_fn, (x, y), chunk_size=chunk_size), method="gauss-newton"
    )
    assert operator.method == "gauss-newton"
    if few:
        assert set(operator.ways.values()) == {"dense"}
    elif build is Shared:
        assert set(operator.ways.values()) == {"loop"}
    else:
        assert "loop" not in operator.ways.values()
    expected = covariance(dense_gauss_newtons(network, loss_fn, x, y))
    v = torch.randn(len(expected), 3, dtype=torch.float64)
    for _ in range(2):
        # Rounding of float64, over sums of a few hundred terms.
        assert relative_error(operator @ v, expected @ v) < 1e-11


def test_a_loss_that_is_not_convex_has_no_rows() -> None:
    """Catches a root taken of a negative second derivative."""
    network, (x, y) = small_network(), small_data()
    problem = Problem(network, lambda z, target: torch.sin(z - target).mean(), (x, y))
    operator = NonUniformity(problem, method="gauss-newton")
    assert set(operator.ways.values()) == {"linear"}
    expected = covariance(dense_gauss_newtons(network, problem.loss_fn, x, y))
    eye = torch.eye(len(expected), dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-11


def test_gauss_newton_is_the_hessians_at_interpolation() -> None:
    """Limiting case: with residuals of zero the two matrices are one."""
    network, (x, _) = small_network(), small_data()
    y = network(x).detach()
    problem = Problem(network, nn.MSELoss(), (x, y))
    eye = torch.eye(problem.num_params, dtype=torch.float64)
    found = NonUniformity(problem, method="gauss-newton") @ eye
    # Residuals are zero to rounding, so the difference is too.
    assert relative_error(found, NonUniformity(problem) @ eye) < 1e-12


@pytest.mark.parametrize("few", [True, False])
def test_gauss_newton_in_scaled_coordinates(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches D applied once where it belongs twice."""
    if not few:
        monkeypatch.setattr(dense_rows, "_NUMBERS", 0)
    network, data = Blocks(), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    scale = [torch.rand_like(p) + 0.5 for p in problem.theta()]
    d = problem.transformed(scale=scale).flatten([torch.ones_like(p) for p in problem.theta()])
    expected = covariance(d[:, None] * dense_gauss_newtons(network, nn.MSELoss(), *data) * d)
    operator = NonUniformity(problem.transformed(scale=scale), method="gauss-newton")
    v = torch.randn(len(expected), 3, dtype=torch.float64)
    assert relative_error(operator @ v, expected @ v) < 1e-11


def test_gauss_newton_needs_the_outputs() -> None:
    """Catches a batch loss, whose outputs are unknown, taken for a mean over outputs."""
    network = small_network()
    problem = Problem.from_batch_loss(
        network, lambda model, batch: model(batch).square().mean(), small_data()[0]
    )
    with pytest.raises(ValueError, match="outputs apart from the loss"):
        NonUniformity(problem, method="gauss-newton")


@pytest.mark.parametrize("method", ["auto", "vmap", "loop", "gauss-newton"])
def test_with_a_preconditioner_against_dense(method) -> None:
    """Catches P left out of the inner product, or applied outside of the sum over samples."""
    network, data = small_network(), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    dense = dense_gauss_newtons if method == "gauss-newton" else dense_hessians
    hessians = dense(network, nn.MSELoss(), *data)
    size = problem.num_params
    root = torch.randn(size, size, dtype=torch.float64) / size**0.5
    p = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    mean = hessians.mean(0)
    expected = torch.stack([h @ p @ h for h in hessians]).mean(0) - mean @ p @ mean
    operator = NonUniformity(problem, method=method, preconditioner=Dense(p))
    eye = torch.eye(size, dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-11


def test_a_diagonal_preconditioner_either_way() -> None:
    """Limiting case: a diagonal P as an operator, and as coordinates of the problem."""
    network, data = small_network(), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    roots = [torch.rand_like(p) + 0.5 for p in problem.theta()]
    diagonal = problem.flatten([root**2 for root in roots])
    scaled = top_eigenpair(NonUniformity(problem.transformed(scale=roots)), tol=1e-9).value
    d = diagonal.sqrt()
    operator = NonUniformity(problem, preconditioner=Dense(torch.diag(diagonal)))
    matrix = d[:, None] * (operator @ torch.eye(len(d), dtype=torch.float64)) * d
    # The residual of 1e-9 enters the eigenvalue squared.
    assert scaled == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)


def test_a_structured_product_takes_no_preconditioner() -> None:
    """Catches a preconditioner that is silently left out."""
    problem = Problem(small_network(), nn.MSELoss(), small_data())
    with pytest.raises(ValueError, match="preconditioner"):
        NonUniformity(problem, method="structured", preconditioner=Dense(torch.eye(38)))
