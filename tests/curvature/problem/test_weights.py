"""Losses that weigh samples: curvature is that of the weighted samples, in any order and chunks."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from oracles import covariance
from torch import Tensor, nn
from weighted_losses import WEIGHTED, Case, N, built, cross_entropy, random, sample_hessians

import stableopt
from stableopt.curvature import DualCurvature, GaussNewton, Hessian, NonUniformity, Problem


@pytest.fixture(params=WEIGHTED)
def case(request: pytest.FixtureRequest) -> Case:
    return built(request.param)


def close(actual: Tensor, expected: Tensor) -> bool:
    # Sums of the same numbers in another order, in double precision.
    return bool((actual - expected).norm() <= 1e-12 * expected.norm())


def test_order_and_chunks_change_nothing(case: Case) -> None:
    """Catches chunks that are averaged by their numbers of samples, and samples by themselves, whose
    weights cancel.
    """
    samples = sample_hessians(case)
    mean, spread = samples.mean(0), covariance(samples)
    for order in (torch.arange(N), torch.arange(N).flip(0)):
        for chunk_size in (1, 3, N):
            data = (case.data[0][order], case.data[1][order])
            problem = Problem(
                case.model,
                case.loss,
                data,
                chunk_size=chunk_size,
                sample_weight=case.sample_weight,
            )
            vectors = random(problem.num_params, 2)
            assert close(Hessian(problem) @ vectors, mean @ vectors)
            for method in ("structured", "vmap", "loop"):
                sigma = NonUniformity(problem, method=method)  # type: ignore[arg-type]
                assert close(sigma @ vectors, spread @ vectors), (method, chunk_size)


def test_gauss_newton_and_the_gram_matrix_agree(case: Case) -> None:
    """Catches weights that reach the loss of a batch, but not its second derivative in the outputs."""
    problem = Problem(
        case.model, case.loss, case.data, chunk_size=3, sample_weight=case.sample_weight
    )
    identity = torch.eye(problem.num_params, dtype=torch.float64)
    matrix = GaussNewton(problem) @ identity
    samples = sample_hessians(case, linearised=True)
    assert close(matrix, samples.mean(0))
    dual = DualCurvature.from_problem(problem)
    assert dual.sharpness == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)
    largest = float(torch.linalg.eigvalsh(covariance(samples))[-1]) ** 0.5
    assert dual.non_uniformity == pytest.approx(largest, rel=1e-10)


def test_targets_that_the_loss_computes_are_counted() -> None:
    """Catches a search for ignored targets in the data, where the loss makes them by a clamp, and the
    first samples have none.
    """
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x, y = random(12, 2), torch.arange(12) % 3
    y[9:] = 9

    def clamped(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels.clamp(max=3), ignore_index=3)

    reference = Problem(model, nn.CrossEntropyLoss(), (x, y.where(y < 9, -100)), chunk_size=5)
    problem = Problem(model, clamped, (x, y), chunk_size=5)
    vector = random(problem.num_params)
    assert close(Hessian(problem) @ vector, Hessian(reference) @ vector)
    assert close(NonUniformity(problem) @ vector, NonUniformity(reference) @ vector)


def test_critical_rates_against_enumeration() -> None:
    """Catches weights that the critical learning rate leaves out, and batches of weighted samples.

    Of a linear model the Gauss-Newton matrices are the Hessians. Steps over all subsets of a batch's
    size give the second moments; the largest stable rate is found by bisection.
    """
    torch.manual_seed(0)
    n, model, weight = 5, nn.Linear(2, 2).double(), torch.tensor([1.0, 6.0]).double()
    x, y = random(n, 2), torch.tensor([0, 1, 0, 0, 1])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def sample_loss(params: Tensor, index: int) -> Tensor:
        outputs = x[index] @ params[:4].view(2, 2).T + params[4:]
        share = n * weight[y[index]] / weight[y].sum()
        return share * nn.functional.cross_entropy(outputs, y[index])

    samples = torch.stack(
        [torch.func.jacrev(torch.func.grad(sample_loss))(theta, index) for index in range(n)]
    )
    values, vectors = torch.linalg.eigh(samples.mean(0))
    moving = vectors[:, values > 1e-9]  # others do not move
    moving_pairs = torch.kron(moving, moving)

    def radius(lr: float, size: int) -> float:
        subsets = list(itertools.combinations(range(n), size))
        steps = [torch.eye(6) - lr * samples[list(subset)].mean(0) for subset in subsets]
        moments = torch.stack([torch.kron(step, step) for step in steps]).mean(0)
        return float(torch.linalg.eigvals(moving_pairs.T @ moments @ moving_pairs).abs().max())

    for size in (1, 2, n):
        low, high = 1e-3, 10.0
        for _ in range(45):
            middle = (low + high) / 2
            low, high = (middle, high) if radius(middle, size) <= 1 else (low, middle)
        problem = Problem(model, nn.CrossEntropyLoss(weight), (x, y), chunk_size=2)
        # The residual is 1e-8, and that of an eigenvalue its square; bisection ends at 3e-13.
        critical = stableopt.critical_lr(problem, size, tol=1e-8)
        assert critical.value == pytest.approx(low, rel=1e-10)
        assert stableopt.critical_batch_size(problem, low * (1 - 1e-4), tol=1e-8) == size
        above = stableopt.critical_batch_size(problem, low * (1 + 1e-4), tol=1e-8)
        assert above == (size + 1 if size < n else None)


def test_weights_as_a_tensor_follow_the_samples() -> None:
    case = built("own weights")
    weights = case.data[1][:, 2]
    by_tensor = Problem(case.model, case.loss, case.data, chunk_size=3, sample_weight=weights)
    by_function = Problem(
        case.model, case.loss, case.data, chunk_size=3, sample_weight=case.sample_weight
    )
    assert close(by_tensor.gradient(), by_function.gradient())
    with pytest.raises(ValueError, match=r"shape \(4,\) for samples 0 to 9: expected \(10,\)"):
        Problem(case.model, case.loss, case.data, sample_weight=weights[:4])
    with pytest.raises(ValueError, match="finite weights that are not negative"):
        Problem(case.model, case.loss, case.data, sample_weight=-weights)
    with pytest.raises(ValueError, match="sample_weight: with these weights the gradient"):
        Problem(case.model, case.loss, case.data, sample_weight=weights.square())
    with pytest.raises(TypeError, match="sample_weight='w'"):
        Problem(case.model, case.loss, case.data, sample_weight="w")  # type: ignore[arg-type]


def test_unknown_weights_are_refused_where_they_matter() -> None:
    """Catches weights sought in the losses, which are all log C for a new head, or only in the
    first samples.
    """
    torch.manual_seed(0)
    labels = (torch.arange(400) >= 350).long()  # sorted, as from one folder a class
    x, weight = torch.randn(400, 2) + labels[:, None], torch.tensor([1.0, 7.0])
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return (weight[labels] * cross_entropy(outputs, labels)).sum() / weight[labels].sum()

    measured = stableopt.measure(model, own_loss, (x, labels), lr=0.1)
    reference = stableopt.measure(model, nn.CrossEntropyLoss(weight), (x, labels), lr=0.1)
    assert measured.sharpness == pytest.approx(reference.sharpness, rel=1e-5)
    with pytest.raises(ValueError, match=r"weighs samples unequally.*sample_weight="):
        NonUniformity(Problem(model, own_loss, (x, labels)))
    with pytest.raises(ValueError, match=r"weighs samples unequally.*chunk_size="):
        Problem(model, own_loss, (x, labels), chunk_size=50)
    weighted = stableopt.measure(
        model,
        own_loss,
        (x, labels),
        chunk_size=50,
        sample_weight=lambda batch: weight[batch[1]],
        quantities=("sharpness", "non_uniformity"),
    )
    unchunked = stableopt.measure(
        model,
        nn.CrossEntropyLoss(weight),
        (x, labels),
        quantities=("sharpness", "non_uniformity"),
    )
    # Both searches stop at a residual of 1e-3, whose square is the error of an eigenvalue.
    assert weighted.sharpness == pytest.approx(unchunked.sharpness, rel=1e-5)
    assert weighted.non_uniformity == pytest.approx(unchunked.non_uniformity, rel=1e-5)


@pytest.mark.parametrize("ignored", [0, -100])
def test_the_refusal_names_the_way_out(ignored: int) -> None:
    """Catches advice that does not mention that a loss may divide by counts of targets."""
    case = built("padded tokens")
    x, y = case.data
    y = torch.where(y == -100, ignored, y + 1)

    def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        counted = labels != ignored
        losses = cross_entropy(outputs, (labels - 1).clamp(min=0)) * counted
        return losses.sum() / counted.sum().clamp(min=1)

    advice = r"sample_weight= \(often each sample's number of targets that count\), or chunk_size="
    with pytest.raises(ValueError, match=advice):
        Problem(case.model, own_loss, (x, y), chunk_size=4)
    counts = (y != ignored).sum(1)
    weighted = Problem(case.model, own_loss, (x, y), chunk_size=4, sample_weight=counts)
    reference = Problem(case.model, case.loss, case.data)
    assert close(weighted.gradient(), reference.gradient())


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_loss_that_calls_torchs_for_each_sample_is_the_mean_of_its_calls(
    chunk_size: int | None,
) -> None:
    """Catches class weights that count although they cancel: each call divides by its own."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double(), random(8, 2)
    y, weight = torch.arange(8) % 3, torch.tensor([1.0, 5.0, 0.5]).double()

    def looped(outputs: Tensor, labels: Tensor) -> Tensor:
        calls = [
            nn.functional.cross_entropy(
                outputs[i : i + 1], labels[i : i + 1], weight=weight, ignore_index=9
            )
            for i in range(len(labels))
        ]
        return torch.stack(calls).mean()

    problem = Problem(model, looped, (x, y), chunk_size=chunk_size)
    assert problem.equal_weights
    # Each call is the sample's plain loss.
    reference = Problem(model, nn.CrossEntropyLoss(), (x, y))
    vector = random(problem.num_params)
    assert close(Hessian(problem) @ vector, Hessian(reference) @ vector)
    for method in ("vmap", "loop"):
        sigma = NonUniformity(problem, method=method)  # type: ignore[arg-type]
        assert close(sigma @ vector, NonUniformity(reference) @ vector)


def test_only_weighted_losses_are_weighed() -> None:
    """Catches weights applied to plain means, whose results must not change."""
    model, labels = nn.Linear(2, 3), torch.arange(12) % 3
    x = torch.randn(12, 2)
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.full((3,), 2.0))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            problem = Problem(model, loss, (x, labels), chunk_size=5)
        assert problem.equal_weights
        expected = torch.autograd.grad(loss(model(x), labels), list(model.parameters()))
        # Rounding of single precision.
        torch.testing.assert_close(
            problem.gradient(), problem.flatten(expected), rtol=1e-5, atol=1e-6
        )


def test_batches_of_other_forms_keep_their_weights() -> None:
    """Catches a sample without weight that is replaced by one with other tensors, or another length."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        losses = sum(model(x.mean(1)).square().squeeze(1) for x in batch["xs"])
        return (losses * batch["w"]).sum() / batch["w"].sum()

    def batch(lists: int, length: int, *weights: float) -> Any:
        xs = [torch.randn(len(weights), length, 2) for _ in range(lists)]
        return {"xs": xs, "w": torch.tensor(weights)}

    data = [batch(1, 3, 1.0, 0.0), batch(2, 3, 0.0, 2.0), batch(1, 5, 1.0)]
    problem = Problem.from_batch_loss(model, loss, data, sample_weight=lambda b: b["w"])
    whole = float(Hessian(problem).__matmul__(torch.ones(3)).sum())
    weighted = 0.0
    for each in data:
        for k in range(len(each["w"])):
            one = {"xs": [x[k : k + 1] for x in each["xs"]], "w": torch.ones(1)}
            single = Problem.from_batch_loss(model, loss, one)
            weighted += float(each["w"][k]) * float((Hessian(single) @ torch.ones(3)).sum())
    assert whole == pytest.approx(weighted / 4, rel=1e-5)
    # Of every form some sample has a weight, so each sample has a Hessian of its own.
    vmapped, looped = (
        NonUniformity(problem, method=method) @ torch.ones(3) for method in ("vmap", "loop")
    )
    assert torch.allclose(vmapped, looped, rtol=1e-4)
    assert bool(looped.isfinite().all())


def test_all_weights_zero_are_an_error() -> None:
    data = torch.randn(4, 2), torch.full((4,), -100)
    with pytest.raises(ValueError, match="all 4 samples have weight zero"):
        Problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), data)
