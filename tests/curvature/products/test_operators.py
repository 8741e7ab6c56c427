"""Products against per-sample Hessians formed densely, and against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles import covariance, dense_hessians, relative_error, small_data, small_network
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Operator,
    Problem,
    SecondDerivativeError,
    top_eigenpair,
)
from stableopt.curvature.per_sample.generic import samples_at_once

LOSSES = [nn.MSELoss(), nn.CrossEntropyLoss(), nn.HuberLoss(delta=0.3)]


def eye(operator: Operator) -> Tensor:
    return torch.eye(operator.shape[0], dtype=operator.dtype)


# Products in float64 lose a few digits to the d-term sums: 1e-8 is the promise, 1e-12 what is seen.
PRODUCT = 1e-10


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


@pytest.mark.parametrize("method", ["structured", "vmap", "loop"])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: type(f).__name__)
def test_non_uniformity_is_the_covariance_of_the_dense_per_sample_hessians(
    network: nn.Module, data: tuple[Tensor, Tensor], loss_fn: nn.Module, method: str
) -> None:
    """Catches a Hessian of the mean where the mean of squares belongs, and the reverse."""
    x, y = data
    y = y.softmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    operator = NonUniformity(Problem(network, loss_fn, (x, y)), method=method)
    expected = covariance(dense_hessians(network, loss_fn, x, y))
    assert relative_error(operator @ eye(operator), expected) < PRODUCT


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: type(f).__name__)
def test_gauss_newton_is_the_jacobian_sandwich(
    network: nn.Module, data: tuple[Tensor, Tensor], loss_fn: nn.Module
) -> None:
    """Catches the Hessian given out as Gauss-Newton: here the residuals are far from zero."""
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
    whole = kind(Problem(network, nn.MSELoss(), data))
    chunked = kind(Problem(network, nn.MSELoss(), data, chunk_size=chunk_size))
    expected = whole @ eye(whole)
    for _ in range(2):  # the second product goes by what the first one kept
        assert relative_error(chunked @ eye(whole), expected) < PRODUCT


class Rows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Stream(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


class Batched:
    """Re-iterable, without a length."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.parts = list(zip(x.split(3), y.split(3), strict=True))

    def __iter__(self):
        return iter(self.parts)


FORMS = {
    "pair": lambda x, y: (x, y),
    "list pair": lambda x, y: [x, y],
    "batches": lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
    "re-iterable": Batched,
    "dataset": Rows,
    "tensor dataset": TensorDataset,
    "iterable dataset": Stream,
    "loader": lambda x, y: DataLoader(Rows(x, y), batch_size=3),
    "shuffled loader that drops": lambda x, y: DataLoader(
        Rows(x, y), batch_size=3, shuffle=True, drop_last=True
    ),
    "stream loader": lambda x, y: DataLoader(Stream(x, y), batch_size=3),
    "batch sampler": lambda x, y: DataLoader(Rows(x, y), batch_sampler=[[0, 3], [1, 2, 4, 5], [6]]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_matrix(
    network: nn.Module, data: tuple[Tensor, Tensor], form: str
) -> None:
    """Catches a reader that loses a ragged last batch or counts batches instead of samples."""
    expected = Hessian(Problem(network, nn.MSELoss(), data))
    problem = Problem(network, nn.MSELoss(), FORMS[form](*data))
    found = Hessian(problem)
    assert problem.num_samples == 7
    assert relative_error(found @ eye(found), expected @ eye(expected)) < PRODUCT


def test_a_sampler_that_chooses_is_honoured(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches the whole data set measured where the loader serves a subset."""
    sampler = torch.utils.data.SubsetRandomSampler([1, 4, 6])
    loader = DataLoader(Rows(*data), batch_size=2, sampler=sampler)
    problem = Problem(network, nn.MSELoss(), loader)
    x, y = data
    kept = [1, 4, 6]
    expected = Hessian(Problem(network, nn.MSELoss(), (x[kept], y[kept])))
    assert problem.num_samples == 3
    assert relative_error(Hessian(problem) @ eye(expected), expected @ eye(expected)) < PRODUCT


def test_batch_loss_measures_dictionaries(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Catches parameters that are not swapped inside a user's own loss."""
    x, y = data
    batch = {"inputs": x, "labels": y, "scale": torch.tensor(1.0).double(), "name": "probe"}

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return nn.functional.mse_loss(model(batch["inputs"]), batch["labels"]) * batch["scale"]

    expected = Hessian(Problem(network, nn.MSELoss(), data))
    for form in (
        batch,
        [batch],
        [{**batch, "inputs": x[:4], "labels": y[:4]}, {**batch, "inputs": x[4:], "labels": y[4:]}],
    ):
        problem = Problem.from_batch_loss(network, loss, form, chunk_size=2)
        assert problem.num_samples == 7
        assert relative_error(Hessian(problem) @ eye(expected), expected @ eye(expected)) < PRODUCT
        spread = NonUniformity(problem, method="vmap") @ eye(expected)
        assert (
            relative_error(spread, covariance(dense_hessians(network, nn.MSELoss(), x, y)))
            < PRODUCT
        )
    with pytest.raises(ValueError, match="GaussNewton needs"):
        GaussNewton(problem)


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


def test_transformed_coordinates(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Catches a scale applied on one side only, and a preconditioner outside the square in Sigma."""
    problem = Problem(network, nn.MSELoss(), data)
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    scale, decay = [0.5, 2.0, 1.0, 0.1], [0.0, 0.3, 0.1, 0.2]
    sizes = [p.numel() for p in network.parameters()]
    repeats = torch.tensor(sizes)
    diagonal = torch.tensor(scale, dtype=torch.float64).repeat_interleave(repeats)
    shift = torch.tensor(decay, dtype=torch.float64).repeat_interleave(repeats)
    seen = problem.transformed(sign=-1, scale=scale, weight_decay=decay)
    inside = diagonal[:, None] * hessians * diagonal
    expected = -inside.mean(0) + torch.diag(diagonal**2 * shift)
    assert relative_error(Hessian(seen) @ eye(Hessian(seen)), expected) < PRODUCT
    for method in ("structured", "vmap", "loop"):
        spread = NonUniformity(seen, method=method)
        assert relative_error(spread @ eye(spread), covariance(inside)) < PRODUCT


def test_some_parameters_only(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Catches a block of the Hessian taken from the wrong rows."""
    full = dense_hessians(network, nn.MSELoss(), *data).mean(0)
    chosen = [network[2].weight, network[0].bias]  # in another order than the model's
    hessian = Hessian(Problem(network, nn.MSELoss(), data, params=chosen))
    rows = list(range(15, 20)) + list(range(20, 35))
    assert relative_error(hessian @ eye(hessian), full[rows][:, rows]) < PRODUCT


def test_frozen_tied_and_unused_parameters(data: tuple[Tensor, Tensor]) -> None:
    """Catches tied weights counted twice or swapped once, and a crash on a missing gradient."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(2, 2)
            self.second.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied().double()
    x, y = data
    hessian = Hessian(Problem(model, nn.MSELoss(), data))
    weight, bias = model.first.weight, model.first.bias

    def loss(flat: Tensor) -> Tensor:
        w, b = flat[:9].view(3, 3), flat[9:12]
        out = torch.tanh(x @ w.T + b) @ w.T + model.second.bias.detach()
        return nn.functional.mse_loss(out, y)

    point = torch.cat([weight.detach().reshape(-1), bias.detach()])
    expected = torch.zeros(18, 18, dtype=torch.float64)
    expected[:12, :12] = torch.autograd.functional.hessian(loss, point)
    assert hessian.shape == (18, 18)
    assert relative_error(hessian @ eye(hessian), expected) < PRODUCT


class Unstructured(nn.Module):
    """Holds a parameter that no layer knows of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.inner(x))


def test_a_module_that_vmap_cannot_follow_is_measured_by_the_loop(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a crash, or a silent wrong answer, for control flow that depends on the data."""

    class Branching(Unstructured):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    operator = NonUniformity(Problem(Branching(network), nn.MSELoss(), data, chunk_size=1))
    assert operator.method == "vmap"
    product = operator @ eye(operator)
    assert operator.method == "loop"
    expected = covariance(dense_hessians(operator.problem.model, nn.MSELoss(), *data))
    assert relative_error(product, expected) < PRODUCT
    strict = NonUniformity(operator.problem, method="vmap")
    with pytest.raises(RuntimeError):
        strict @ eye(operator)


def test_large_models_take_few_samples_at_once(problem: Problem) -> None:
    """Catches memory that grows with the model times the data."""
    other = Problem(Unstructured(problem.model), nn.MSELoss(), small_data())
    assert NonUniformity(other, memory=1).method == "loop"
    roomy = 8 * 41 * 8 * 20  # eight copies of 41 parameters in double precision, for 20 samples
    assert NonUniformity(other, memory=roomy).method == "vmap"
    assert samples_at_once(other, roomy) == 20


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


def test_scalar_chain_has_closed_sharpness_and_non_uniformity() -> None:
    """Y = theta x through a product of weights, half squared loss: with G = sum (theta / w_l)^2,
    H_i = G x_i^2 at the minimum, so a = G mean(x^2) and s = G std(x^2).
    """

    class Chain(nn.Module):
        def __init__(self, weights: list[float]) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.prod() * x

    weights = [0.7, -1.3, 2.0]
    theta = math.prod(weights)
    x = torch.linspace(-1, 2, 11, dtype=torch.float64)
    problem = Problem(Chain(weights), lambda z, y: 0.5 * (z - y).square().mean(), (x, theta * x))
    slope = sum((theta / w) ** 2 for w in weights)
    a = top_eigenpair(Hessian(problem), tol=1e-10).value
    s = math.sqrt(top_eigenpair(NonUniformity(problem), tol=1e-10).value)
    assert a == pytest.approx(slope * float((x**2).mean()), rel=1e-10)
    assert s == pytest.approx(slope * float((x**2).std(correction=0)), rel=1e-10)


def test_orthogonal_jacobians() -> None:
    """Samples in k_1, ..., k_m groups see orthogonal parameters: with f_i = J_i^2 w^2 / 2,
    a = k_max / n and s = k_max sqrt(n - 1) / n for J_i = sqrt(k_i) e_i.
    """
    k = torch.tensor([5.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    n = len(k)
    model = nn.Linear(n, 1, bias=False).double()
    x = torch.diag(k.sqrt())
    data = (x, torch.zeros(n, 1, dtype=torch.float64))
    problem = Problem(model, lambda z, y: 0.5 * (z - y).square().mean(), data)
    assert top_eigenpair(Hessian(problem), tol=1e-9).value == pytest.approx(5 / n, rel=1e-10)
    s = math.sqrt(top_eigenpair(NonUniformity(problem), tol=1e-9).value)
    assert s == pytest.approx(5 * math.sqrt(n - 1) / n, rel=1e-10)


def test_matrix_factorisation() -> None:
    """Half ||U V^T - M||^2 at U V^T = M has largest eigenvalue sigma_1(U)^2 + sigma_1(V)^2."""

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.u = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))
            self.v = nn.Parameter(torch.randn(5, 2, generator=generator, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.u @ self.v.T).expand(len(x), 4, 5)

    model = Factors()
    target = (model.u @ model.v.T).detach()[None]
    problem = Problem(
        model,
        lambda z, y: 0.5 * (z - y).square().sum((1, 2)).mean(),
        (torch.zeros(1, 1, dtype=torch.float64), target),
    )
    u, v = model.u.detach(), model.v.detach()
    expected = torch.linalg.matrix_norm(u, 2) ** 2 + torch.linalg.matrix_norm(v, 2) ** 2
    found = top_eigenpair(Hessian(problem), tol=1e-10)
    assert found.converged
    assert found.value == pytest.approx(float(expected), rel=1e-10)


def test_eigenvalues_of_a_network_against_dense_ones(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a wrong matrix and a wrong search at once; 1e-6 is the promise."""
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    problem = Problem(network, nn.MSELoss(), data)
    for operator, dense in (
        (Hessian(problem), hessians.mean(0)),
        (NonUniformity(problem), covariance(hessians)),
    ):
        expected = float(torch.linalg.eigvalsh(dense)[-1])
        found = top_eigenpair(operator, tol=1e-8)
        assert found.converged
        assert found.value == pytest.approx(expected, rel=1e-10)


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


def test_weight_norm_is_measured_rightly() -> None:
    """Catches the second derivative of torch's fused weight norm, off by tens of percent in torch
    2.13: whichever way is taken must agree with differences of the gradient.
    """
    torch.manual_seed(0)
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)).double()
    data = small_data()
    hessian = Hessian(Problem(model, nn.MSELoss(), data))
    point = torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def gradient(at: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(at, model.parameters())
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
