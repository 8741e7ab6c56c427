"""The Gram matrix of the outputs' Jacobians, against dense matrices and the operators."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import covariance, dense_hessians, relative_error, small_data, small_network
from torch import Tensor, nn

from stableopt.curvature import (
    DualCurvature,
    GaussNewton,
    NonFiniteError,
    Problem,
    top_eigenpairs,
)
from stableopt.curvature.gram.gram import Modes, project, sample_sizes
from stableopt.curvature.gram.layer_gram import fully_connected

Data = tuple[Tensor, Tensor]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def dense_factors(model: nn.Module, x: Tensor, loss_hessians: Tensor) -> Tensor:
    """Return L_i^(1/2) J_i ``(n, C, d)``, entry by entry, for L ``(n, C, C)``."""
    rows = []
    for i in range(len(x)):
        output = model(x[i : i + 1]).squeeze(0)
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            g.reshape(-1)
                            for g in torch.autograd.grad(
                                z, list(model.parameters()), retain_graph=True
                            )
                        ]
                    )
                    for z in output
                ]
            )
        )
    values, vectors = torch.linalg.eigh(loss_hessians)
    # The softmax's L has a zero eigenvalue; rounding makes it 1e-17, whose root would be 3e-9.
    values = torch.where(values > 1e-14, values, 0.0)
    roots = (vectors * values.sqrt().unsqueeze(1)) @ vectors.mT
    return roots @ torch.stack(rows)


def softmax_curvature(outputs: Tensor) -> Tensor:
    pi = outputs.detach().softmax(1)
    return torch.diag_embed(pi) - pi.unsqueeze(2) * pi.unsqueeze(1)


def test_gram_of_squared_loss_and_cross_entropy(network: nn.Module, data: Data) -> None:
    """Catches a missing factor 2/C, and an L that is missing, not rooted, or of another sample; both
    losses have a closed-form L.
    """
    x, y = data
    squared = (2 / 3 * torch.eye(3, dtype=torch.float64)).expand(7, 3, 3)
    rows = dense_factors(network, x, squared).flatten(0, 1)
    curvature = DualCurvature.from_problem(Problem(network, nn.MSELoss(), (x, y)))
    assert relative_error(curvature.gram, rows @ rows.T) < 1e-13  # rounding of sums of 38 terms
    assert curvature.num_outputs == 3

    rows = dense_factors(network, x, softmax_curvature(network(x))).flatten(0, 1)
    curvature = DualCurvature.from_problem(Problem(network, nn.CrossEntropyLoss(), (x, LABELS)))
    # The root is unique only up to rotations within a sample; both take the symmetric one.
    assert relative_error(curvature.gram, rows @ rows.T) < 1e-12


def test_both_coordinates_are_those_of_the_hessians_at_interpolation(network: nn.Module) -> None:
    """Catches a Sigma with K instead of its diagonal blocks, and a missing square root or 1/n: where
    residuals vanish, dense Hessians say what is right.
    """
    x, _ = small_data()
    y = network(x).detach()
    hessians = dense_hessians(network, nn.MSELoss(), x, y)
    curvature = DualCurvature.from_problem(Problem(network, nn.MSELoss(), (x, y)))
    top = float(torch.linalg.eigvalsh(hessians.mean(0))[-1])
    spread = float(torch.linalg.eigvalsh(covariance(hessians))[-1])
    assert curvature.sharpness == pytest.approx(top, rel=1e-12)
    assert curvature.non_uniformity == pytest.approx(math.sqrt(spread), rel=1e-12)


def test_modes_are_the_samples_in_the_eigenbasis_of_the_mean(problem: Problem) -> None:
    """Catches factors scaled wrongly: their own mean must be the diagonal of the eigenvalues, and
    their Gram matrix K, block for block.
    """
    dual = DualCurvature.from_problem(problem)
    modes = dual.modes
    rows = modes.factors.flatten(0, 1)
    assert relative_error(rows @ rows.T, dual.gram) < 1e-12
    assert relative_error(rows.T @ rows / 7, torch.diag(modes.eigenvalues)) < 1e-12
    assert relative_error(modes.factors @ modes.factors.mT, dual.blocks) < 1e-12
    assert bool((modes.eigenvalues.diff() >= 0).all())


class Gained(nn.Module):
    """The network with a gain of its own, so that it is not made of linear layers alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gain = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.gain * self.network(x)
        return outputs


@pytest.mark.parametrize("memory", [1, 40_000, 2**30])
def test_chunks_change_nothing(network: nn.Module, data: Data, memory: int) -> None:
    """Catches misplaced blocks where not all rows fit in memory: 1 byte forces one sample at a
    time, 40,000 bytes uneven parts, and the problem's chunks of 3 divide these again.
    """
    x, y = data
    model = Gained(network)
    loss_hessians = (2 / 3 * torch.eye(3, dtype=torch.float64)).expand(7, 3, 3)
    rows = dense_factors(model, x, loss_hessians).flatten(0, 1)
    for chunk_size in (None, 3):
        problem = Problem(model, nn.MSELoss(), (x, y), chunk_size=chunk_size)
        curvature = DualCurvature.from_problem(problem, memory=memory)
        assert relative_error(curvature.gram, rows @ rows.T) < 1e-13


def test_layers_give_the_same_matrix_as_rows(network: nn.Module, data: Data) -> None:
    """Catches the layer-wise formula used where it does not hold: for a layer called twice, a
    shared weight, or a layer over positions. Where it holds, catches wrong chunks.
    """
    x, y = data
    loss_hessians = (2 / 3 * torch.eye(3, dtype=torch.float64)).expand(7, 3, 3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.layer(self.layer(x).tanh())
            return outputs

    class Tied(Twice):
        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.layer(x).tanh() @ self.layer.weight
            return outputs

    class Positions(Twice):
        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.layer(torch.stack([x, x**2], dim=1)).tanh().sum(1)
            return outputs

    for model in (network, Twice(), Tied(), Positions()):
        rows = dense_factors(model, x, loss_hessians).flatten(0, 1)
        for chunk_size in (None, 3):
            problem = Problem(model, nn.MSELoss(), (x, y), chunk_size=chunk_size)
            expected = rows @ rows.T
            assert relative_error(DualCurvature.from_problem(problem).gram, expected) < 1e-13
        theta = problem.theta()
        with problem.evaluation():
            assert (fully_connected(problem, theta) is not None) == (model is network)
    # Frozen biases, and one chosen layer.
    params = [network[0].weight, network[2].weight, network[2].bias]
    problem = Problem(network, nn.MSELoss(), data, params=params)
    g = GaussNewton(problem) @ torch.eye(33, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(g)[-21:]
    assert relative_error(DualCurvature.from_problem(problem).modes.eigenvalues, expected) < 1e-12


def test_coordinates_of_the_problem(network: nn.Module, data: Data) -> None:
    """Catches D applied once, or to the outputs: G becomes D G D, and weight decay is left out."""
    plain = Problem(network, nn.MSELoss(), data)
    d = torch.cat([torch.full((k,), f) for k, f in ((15, 0.5), (5, 2.0), (15, 3.0), (3, 1.0))])
    g = GaussNewton(plain) @ torch.eye(38, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(d[:, None] * g * d)[-21:]
    for third in (3.0, torch.full((3, 5), 3.0, dtype=torch.float64)):
        problem = plain.transformed(scale=[0.5, 2.0, third, 1.0], weight_decay=[1.0] * 4)
        assert (
            relative_error(DualCurvature.from_problem(problem).modes.eigenvalues, expected) < 1e-12
        )


class _Stubborn(torch.autograd.Function):
    """A square that vmap cannot follow: it has no rule for it."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * slope


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


class StubbornSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = _Stubborn.apply(x)
        return outputs


def test_modules_that_vmap_cannot_follow_go_one_by_one() -> None:
    """Catches a fallback that differs from the vectorised computation, in model or loss."""
    layer = nn.Linear(3, 2).double()
    x, _ = small_data()
    y = torch.zeros(7, 2, dtype=torch.float64)

    def stubborn_loss(z: Tensor, y: Tensor) -> Tensor:
        return (StubbornSquare()(z - y) * torch.tensor([1.0, 3.0])).mean()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 2 * torch.tensor([1.0, 3.0])).mean()

    expected = DualCurvature.from_problem(Problem(nn.Sequential(layer, Square()), loss, (x, y)))
    model = nn.Sequential(layer, StubbornSquare())
    curvature = DualCurvature.from_problem(Problem(model, stubborn_loss, (x, y)))
    assert relative_error(curvature.gram, expected.gram) < 1e-13


def test_single_precision_is_summed_in_double(data: Data) -> None:
    """Catches a Gram matrix in the model's precision: eigenvalues far below its rounding would drown."""
    double = small_network()
    single = small_network().float()
    x, y = data
    expected = DualCurvature.from_problem(Problem(double, nn.MSELoss(), (x, y)))
    curvature = DualCurvature.from_problem(Problem(single, nn.MSELoss(), (x.float(), y.float())))
    assert curvature.gram.dtype == torch.float64
    # Rows have the rounding of single precision, 6e-8, a few operations deep.
    assert curvature.sharpness == pytest.approx(expected.sharpness, rel=2e-6)


def test_leading_directions_span_what_they_say(network: nn.Module, data: Data) -> None:
    """Catches a restriction that is not Q^T H_i Q, and eigenvectors in the wrong order."""
    problem = Problem(network, nn.MSELoss(), data)
    pairs = top_eigenpairs(GaussNewton(problem), 5, tol=1e-12, max_iter=10)
    g = GaussNewton(problem) @ torch.eye(38, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(g).flip(0)
    # Ten products in 38 dimensions: an eigenvalue lies within each residual.
    distances = (pairs.values[:, None] - expected).abs().min(1).values
    assert bool((distances <= pairs.absolute_residuals + 1e-12).all())
    # The first two residuals are 2e-3 at most, and values are accurate to their squares.
    assert relative_error(pairs.values[:2], expected[:2]) < 1e-5
    residuals = (g @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(residuals, pairs.absolute_residuals, atol=1e-10)

    basis = pairs.vectors
    rows = dense_factors(network, data[0], (2 / 3 * torch.eye(3).double()).expand(7, 3, 3))
    modes = project(problem, basis)
    restricted = basis.T @ g @ basis
    assert relative_error(modes.eigenvalues, torch.linalg.eigvalsh(restricted)) < 1e-12
    grams = modes.factors @ modes.factors.mT
    assert relative_error(grams, rows @ basis @ (rows @ basis).mT) < 1e-12
    tops = torch.linalg.eigvalsh(rows @ rows.mT)[:, -1]
    assert sample_sizes(problem, memory=1).largest == pytest.approx(float(tops.max()), rel=1e-12)


def test_a_loss_without_curvature_has_none() -> None:
    """Catches a division by a largest eigenvalue of zero."""
    model = nn.Linear(3, 2).double()
    x, _ = small_data()
    y = torch.zeros(7, 2, dtype=torch.float64)
    curvature = DualCurvature.from_problem(Problem(model, nn.L1Loss(), (x, y)))
    assert curvature.sharpness == 0.0
    assert curvature.non_uniformity == 0.0
    assert Modes.from_factors(torch.zeros(2, 1, 3)).eigenvalues.numel() == 0
    basis = torch.zeros(8, 0, dtype=torch.float64)  # no leading directions
    assert project(Problem(model, nn.MSELoss(), (x, y)), basis).eigenvalues.numel() == 0


def test_bad_input_is_named(network: nn.Module, data: Data) -> None:
    """Catches errors from deep inside: which argument was wrong, and what would be right."""
    x, y = data

    def concave(z: Tensor, y: Tensor) -> Tensor:
        return -(z - y).square().mean()

    def batch_loss(model: nn.Module, batch: Data) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match="convex in the outputs"):
        DualCurvature.from_problem(Problem(network, concave, data))
    with pytest.raises(ValueError, match=r"Problem\(model, loss_fn, data\)"):
        DualCurvature.from_problem(Problem.from_batch_loss(network, batch_loss, data))
    with pytest.raises(ValueError, match=r"gram has shape \(3, 2\)"):
        DualCurvature(torch.ones(3, 2), 3)
    with pytest.raises(ValueError, match="with n = 2 samples"):
        DualCurvature(torch.ones(3, 3), 2)
    with pytest.raises(NonFiniteError, match="not finite"):
        DualCurvature(torch.full((2, 2), float("nan")), 2)

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.inner(x),)

    def first_output_loss(z: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return nn.functional.mse_loss(z[0], y)

    with pytest.raises(TypeError, match="returned tuple"):
        DualCurvature.from_problem(Problem(Tuple(), first_output_loss, (x, y)))
