"""Losses that weigh samples: curvature is that of the weighted samples, in any order and chunks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stableopt
from stableopt.curvature import DualCurvature, GaussNewton, Hessian, NonUniformity, Problem

N = 10
CLASSES = torch.tensor([1.0, 7.0, 0.3], dtype=torch.float64)


class Case(NamedTuple):
    """A loss, and the same loss as a sum of terms with weights ``(n,)`` and losses of one sample."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    data: tuple[Tensor, Tensor]
    terms: list[tuple[Tensor, Callable[[Any, Any], Tensor]]]
    sample_weight: Any = None


class Tokens(nn.Module):
    """A language model of two numbers a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(x)))
        return logits.transpose(1, 2)


def network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def class_weights() -> Case:
    y = torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss(CLASSES)
    return Case(network(3), loss, (random(N, 2), y), [(CLASSES[y], cross_entropy)])


def padded_tokens() -> Case:
    x, y = torch.randint(4, (2, N, 5))
    lengths = torch.arange(N) % 6  # also a sample without any target
    y[torch.arange(5) >= lengths[:, None]] = -100

    def of_sample(outputs: Tensor, labels: Tensor) -> Tensor:
        counted = labels != -100
        losses = cross_entropy(outputs, labels.clamp(min=0)) * counted
        return losses.sum() / counted.sum().clamp(min=1)

    y = y.clamp(max=2)
    return Case(Tokens(), nn.CrossEntropyLoss(), (x, y), [(lengths.clamp(max=5), of_sample)])


def two_heads() -> Case:
    y, flipped = torch.randint(3, (N,)), CLASSES.flip(0)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        first = F.cross_entropy(outputs[:, :3], labels, CLASSES)
        second = F.cross_entropy(outputs[:, 2:], labels, flipped, label_smoothing=0.1)
        return first + 0.3 * second + 0.1 * outputs.square().mean()

    def second_of(outputs: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * F.cross_entropy(outputs[:, 2:], labels, flipped, label_smoothing=0.1)

    terms = [
        (CLASSES[y], lambda out, label: cross_entropy(out[:, :3], label)),
        (flipped[y], second_of),
        (torch.ones(N), lambda out, label: 0.1 * out.square().mean()),
    ]
    return Case(network(5), loss, (random(N, 2), y), terms)


def own_weights() -> Case:
    y = torch.cat([random(N, 2), 3 * torch.rand(N, 1).double() + 0.1], 1)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        squares = (outputs - y[:, :2]).square().sum(1)
        return (y[:, 2] * squares).sum() / y[:, 2].sum()

    def of_sample(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y[:, :2]).square().sum()

    return Case(
        network(2), loss, (random(N, 2), y), [(y[:, 2], of_sample)], lambda batch: batch[1][:, 2]
    )


@pytest.fixture(params=[class_weights, padded_tokens, two_heads, own_weights])
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    found: Case = request.param()
    found.model.double()
    for p in found.model.parameters():
        nn.init.normal_(p, std=0.8)
    return found


def sample_hessians(case: Case) -> Tensor:
    """Return the Hessians ``(n, d, d)`` of n w_i f_i / sum(w), each by dense differentiation."""
    shapes = {name: p.shape for name, p in case.model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    found = []
    for index in range(N):
        x, y = (t[index : index + 1] for t in case.data)

        def weighted(at: Tensor, x: Tensor = x, y: Tensor = y, index: int = index) -> Tensor:
            parts = torch.split(at, [shape.numel() for shape in shapes.values()])
            named = {k: part.view(shapes[k]) for k, part in zip(shapes, parts, strict=True)}
            outputs = torch.func.functional_call(case.model, named, (x,))
            losses = [
                w.double()[index] / w.sum() * loss(outputs, y).sum() for w, loss in case.terms
            ]
            return N * torch.stack(losses).sum()

        found.append(torch.func.jacrev(torch.func.grad(weighted))(theta))
    return torch.stack(found)


def close(found: Tensor, expected: Tensor) -> bool:
    # Sums of the same numbers in another order, in double precision.
    return bool((found - expected).norm() <= 1e-12 * expected.norm())


def test_order_and_chunks_change_nothing(case: Case) -> None:
    """Catches chunks that are averaged by their numbers of samples, and samples by themselves, whose
    weights cancel.
    """
    samples = sample_hessians(case)
    mean = samples.mean(0)
    covariance = (samples @ samples).mean(0) - mean @ mean
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
                assert close(sigma @ vectors, covariance @ vectors), (method, chunk_size)


def test_gauss_newton_and_the_gram_matrix_agree(case: Case) -> None:
    """Catches weights that reach the loss of a batch, but not its second derivative in the outputs."""
    problem = Problem(
        case.model, case.loss, case.data, chunk_size=3, sample_weight=case.sample_weight
    )
    identity = torch.eye(problem.num_params, dtype=torch.float64)
    matrix = GaussNewton(problem) @ identity
    covariance = NonUniformity(problem, method="gauss-newton") @ identity
    dual = DualCurvature.from_problem(problem)
    assert dual.sharpness == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)
    largest = float(torch.linalg.eigvalsh(covariance)[-1]) ** 0.5
    assert dual.non_uniformity == pytest.approx(largest, rel=1e-10)


def test_weights_as_a_tensor_follow_the_samples() -> None:
    torch.manual_seed(0)
    case = own_weights()
    case.model.double()
    weights = case.data[1][:, 2]
    by_tensor = Problem(case.model, case.loss, case.data, chunk_size=3, sample_weight=weights)
    by_function = Problem(
        case.model, case.loss, case.data, chunk_size=3, sample_weight=case.sample_weight
    )
    assert close(by_tensor.gradient(), by_function.gradient())
    with pytest.raises(ValueError, match=r"shape \(4,\) for samples 0 to 9: expected \(10,\)"):
        Problem(case.model, case.loss, case.data, sample_weight=weights[:4])
    with pytest.raises(ValueError, match="finite ones that are not negative"):
        Problem(case.model, case.loss, case.data, sample_weight=-weights)
    with pytest.raises(ValueError, match="sample_weight: with these weights the gradient"):
        Problem(case.model, case.loss, case.data, sample_weight=weights.square())
    with pytest.raises(TypeError, match="sample_weight='w'"):
        Problem(case.model, case.loss, case.data, sample_weight="w")  # type: ignore[arg-type]


def test_unknown_weights_are_refused_where_they_matter() -> None:
    """Catches a comparison of losses, all log C at a fresh head, or of the first samples alone."""
    torch.manual_seed(0)
    labels = (torch.arange(400) >= 350).long()  # sorted, as a folder for each class gives
    x, weight = torch.randn(400, 2) + labels[:, None], torch.tensor([1.0, 7.0])
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)

    def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return (weight[labels] * cross_entropy(outputs, labels)).sum() / weight[labels].sum()

    measured = stableopt.measure(model, own_loss, (x, labels), lr=0.1)
    known = stableopt.measure(model, nn.CrossEntropyLoss(weight), (x, labels), lr=0.1)
    assert measured.sharpness == pytest.approx(known.sharpness, rel=1e-5)
    with pytest.raises(ValueError, match=r"weighs samples unequally.*sample_weight="):
        NonUniformity(Problem(model, own_loss, (x, labels)))
    with pytest.raises(ValueError, match=r"weighs samples unequally.*chunk_size="):
        Problem(model, own_loss, (x, labels), chunk_size=50)
    given = stableopt.measure(
        model,
        own_loss,
        (x, labels),
        chunk_size=50,
        sample_weight=lambda batch: weight[batch[1]],
        quantities=("sharpness", "non_uniformity"),
    )
    whole = stableopt.measure(
        model,
        nn.CrossEntropyLoss(weight),
        (x, labels),
        quantities=("sharpness", "non_uniformity"),
    )
    # Both searches stop at a residual of 1e-3, whose square is the error of an eigenvalue.
    assert given.sharpness == pytest.approx(whole.sharpness, rel=1e-5)
    assert given.non_uniformity == pytest.approx(whole.non_uniformity, rel=1e-5)


def test_only_weighted_losses_are_weighed() -> None:
    """Catches a detour for plain means, whose numbers must stay as they are."""
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


def test_all_weights_zero_are_an_error() -> None:
    data = torch.randn(4, 2), torch.full((4,), -100)
    with pytest.raises(ValueError, match="all 4 samples have weight zero"):
        Problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), data)
