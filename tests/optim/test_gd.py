"""``stableopt.GD``: the gradient of all samples, for every form of data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import stableopt

N = 11
"""A prime, so that no chunk size but 1 and 11 divides it."""

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(N, 1, generator=GENERATOR, dtype=torch.float64)

# Sums of 11 products of numbers near 1 in float64, in another order: some 10 roundings of 2e-16.
ROUNDING = {"rtol": 1e-13, "atol": 1e-14}


def linear() -> nn.Linear:
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    return model


def closed_form(weight: Tensor) -> tuple[float, Tensor]:
    r"""Mean of (xw - y)^2, and its gradient 2 X^T (X w - y) / n."""
    residual = X @ weight.detach().T - Y
    return float(residual.square().mean()), 2 * (X.T @ residual).T / N


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


def test_a_model_of_another_optimizer_is_refused() -> None:
    """Catches a loss without gradients: the next step would do nothing."""
    optimizer = stableopt.GD(linear().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the optimizer's parameters a gradient"):
        optimizer.full_gradient(linear(), nn.MSELoss(), (X, Y))


FORMS: dict[str, Any] = {
    "pair": lambda: (X, Y),
    "dataset": Rows,
    "loader": lambda: DataLoader(Rows(), batch_size=4),
    "shuffling_loader": lambda: DataLoader(
        Rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "dropping_loader": lambda: DataLoader(Rows(), batch_size=4, drop_last=True),
    "batches": lambda: [(X[:5], Y[:5]), (X[5:6], Y[5:6]), (X[6:], Y[6:])],
}


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_all_samples(form: str, chunk_size: int | None) -> None:
    """Catches a mean of chunk means, wrong where chunks are ragged, and samples left out."""
    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    model.weight.grad = torch.full_like(model.weight, 7.0)  # to be replaced, not added to
    loss = optimizer.full_gradient(model, nn.MSELoss(), FORMS[form](), chunk_size=chunk_size)
    value, gradient = closed_form(model.weight)
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, gradient, **ROUNDING)
    assert isinstance(loss, float)
    assert loss == pytest.approx(value, rel=1e-13)  # as above


def test_chunk_size_bounds_what_the_model_sees() -> None:
    """Catches a chunk size that is ignored, which the gradient would not show."""
    model, sizes = linear(), []
    model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    optimizer.full_gradient(model, nn.MSELoss(), (X, Y), chunk_size=4)
    assert sizes == [4, 4, 3]


def test_data_are_read_once_a_step() -> None:
    """Catches a pass over the data only to count them, which doubles the time of reading."""
    served = []

    class Counted(Rows):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            served.append(index)
            return super().__getitem__(index)

    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    optimizer.full_gradient(model, nn.MSELoss(), DataLoader(Counted(), batch_size=4))
    assert served == list(range(N))


def test_one_chunk_is_bit_for_bit_a_plain_backward() -> None:
    """Catches rounding by a factor n/n: full-batch runs would drift from plain ones."""
    model, other = linear(), linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.full_gradient(model, nn.MSELoss(), (X, Y))
        optimizer.step()
        reference.zero_grad()
        nn.functional.mse_loss(other(X), Y).backward()
        reference.step()
        assert torch.equal(model.weight, other.weight)


def test_gradient_under_no_grad() -> None:
    """Catches a missing gradient inside of ``no_grad``, as around a closure."""
    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    with torch.no_grad():
        optimizer.full_gradient(model, nn.MSELoss(), (X, Y))
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, closed_form(model.weight)[1], **ROUNDING)


def test_modes_are_left_alone() -> None:
    """Catches a switch to eval mode, by which batch norm would stop learning its statistics."""
    frozen = nn.BatchNorm1d(3).double().eval()
    live, dropout = nn.BatchNorm1d(3).double(), nn.Dropout(0.5)
    dropped: list[bool] = []
    dropout.register_forward_hook(lambda module, args, out: dropped.append(bool((out == 0).any())))
    model = nn.Sequential(frozen, live, dropout, linear())
    flags = [module.training for module in model.modules()]
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    optimizer.full_gradient(model, nn.MSELoss(), (X, Y), chunk_size=4)
    assert [module.training for module in model.modules()] == flags
    assert live.num_batches_tracked is not None
    assert frozen.num_batches_tracked is not None
    assert (int(live.num_batches_tracked), int(frozen.num_batches_tracked)) == (3, 0)
    # 12 units at a rate of one half: all kept has a chance of 2e-4, and the seed is fixed.
    assert dropped == [True] * 3


def once() -> Iterator[Any]:
    yield X, Y


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (once(), TypeError, "only once"),
        (itertools.chain([(X, Y)]), TypeError, "only once"),
        ((X[:0], Y[:0]), ValueError, "empty"),
        ([], ValueError, "empty"),
        (X, TypeError, "single tensor"),
        ((X, Y[:3]), ValueError, "samples"),
    ],
    ids=["generator", "iterator", "no_rows", "no_batches", "no_targets", "uneven"],
)
def test_data_that_cannot_serve(data: Any, error: type[Exception], says: str) -> None:
    """Catches a step without a gradient: data that can be read only once is empty the second time."""
    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    model.weight.grad = kept = torch.ones_like(model.weight)
    with pytest.raises(error, match=says):
        optimizer.full_gradient(model, nn.MSELoss(), data)
    assert model.weight.grad is kept  # refused before anything is touched


def test_loss_that_is_not_a_scalar() -> None:
    """Catches torch's own message, which names neither the loss nor the way out."""
    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="reduction='mean'"):
        optimizer.full_gradient(model, nn.MSELoss(reduction="none"), (X, Y))


def test_full_batch_has_no_non_uniformity_limit() -> None:
    """Catches GD read as SGD: full-batch noise is zero, however the batch is chunked."""
    limits = {}
    for kind in (stableopt.SGD, stableopt.GD):
        model = linear()
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.track(
            model, nn.MSELoss(), (X, Y), every=1, quantities=("sharpness", "non_uniformity")
        )
        if isinstance(optimizer, stableopt.GD):
            optimizer.full_gradient(model, nn.MSELoss(), (X, Y), chunk_size=4)
        else:
            nn.functional.mse_loss(model(X[:4]), Y[:4]).backward()
        optimizer.step()
        margins = optimizer.margins
        assert margins is not None
        assert margins.failure is None
        assert margins.sharpness_limit == 20.0
        limits[kind] = margins.non_uniformity_limit, margins.batch_size
    # (9): sqrt(B (n-1) / (n-B)) / lr. Three roundings.
    expected = math.sqrt(4 * 10 / 7) / 0.1
    assert limits[stableopt.SGD] == (pytest.approx(expected, rel=1e-15 * 4), 4)
    assert limits[stableopt.GD] == (math.inf, N)


def test_full_batch_has_no_limit_before_it_is_seen() -> None:
    """Catches GD recognised by its batch size alone, which fails before a step or on partial data."""
    model = linear()
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    before = optimizer.track(model, nn.MSELoss(), (X, Y)).measure()
    assert (before.non_uniformity_limit, before.batch_size) == (math.inf, N)
    part = optimizer.track(model, nn.MSELoss(), (X, Y), batch_size=N, dataset_size=100).measure()
    assert (part.non_uniformity_limit, part.batch_size) == (math.inf, 100)


def test_tracked_descent_is_the_untracked_one_and_reaches_the_minimum() -> None:
    """Catches gradients with the right direction but a wrong scale; the minimum is known."""
    final = []
    for tracked in (False, True):
        model = linear()
        optimizer = stableopt.GD(model.parameters(), lr=0.5)
        if tracked:
            optimizer.track(model, nn.MSELoss(), (X, Y), every=100)
        for _ in range(250):
            optimizer.full_gradient(model, nn.MSELoss(), (X, Y), chunk_size=4)
            optimizer.step()
        final.append(model.weight.detach())
    assert torch.equal(*final)
    # Curvatures are 0.35, 2.7 and 3.6, so every mode shrinks by 0.83 or better a step: by 1e-20.
    # What is left is rounding, 2e-16, times the condition number, 10, and some.
    solution = torch.linalg.lstsq(X, Y).solution.T
    torch.testing.assert_close(final[0], solution, rtol=1e-13, atol=1e-13)


def weighted_case(name: str) -> tuple[Any, Any]:
    """Return a loss that weighs labels, and its ``sample_weight`` argument."""
    weight = torch.tensor([1.0, 9.0], dtype=torch.float64)
    classes = nn.CrossEntropyLoss(weight)

    def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
        return (weight[labels] * losses).sum() / weight[labels].sum()

    if name == "with squares":
        return (
            lambda outputs, labels: classes(outputs, labels) + 0.1 * outputs.square().mean(),
            None,
        )
    if name == "own":
        return weighted, lambda batch: weight[batch[1]]
    return (classes, None) if name == "classes" else (nn.CrossEntropyLoss(ignore_index=0), None)


@pytest.mark.parametrize("name", ["classes", "ignored", "with squares", "own"])
@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_weighted_losses_have_the_gradient_of_the_batch(name: str, chunk_size: int | None) -> None:
    """Catches chunks weighted by their samples (46 to 112 % off), and 0/0 in a fully ignored chunk."""
    torch.manual_seed(0)
    labels = (torch.arange(N) >= 8).long()
    model = nn.Linear(3, 2).double()
    loss_fn, sample_weight = weighted_case(name)
    whole = loss_fn(model(X), labels)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    loss = optimizer.full_gradient(
        model, loss_fn, (X, labels), chunk_size=chunk_size, sample_weight=sample_weight
    )
    assert loss == pytest.approx(whole.item(), rel=1e-13)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), **ROUNDING)


def test_sums_are_refused() -> None:
    """Catches a sum over each chunk, which the mean over chunks divides by their number."""
    optimizer = stableopt.GD((model := linear()).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="use reduction='mean'"):
        optimizer.full_gradient(model, nn.MSELoss(reduction="sum"), (X, Y))
    labels = torch.full((N,), -100)
    with pytest.raises(ValueError, match="all 11 samples have weight zero"):
        optimizer.full_gradient(nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), (X, labels))


def test_other_parameters_of_the_model_keep_their_gradients() -> None:
    """Catches gradients of another optimizer's parameters, summed over chunks and never zeroed."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x, y = torch.ones(8, 2), torch.zeros(8, 1)
    groups = [{"params": []}, {"params": model[0].parameters()}]  # an empty group has no device
    optimizer = stableopt.GD(groups, lr=0.1)
    nn.MSELoss()(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model[1].weight.grad = None
    for _ in range(2):
        optimizer.full_gradient(model, nn.MSELoss(), (x, y), chunk_size=2)
    assert model[1].weight.grad is None
    assert torch.equal(model[1].bias.grad, expected[3])
    for p, gradient in zip(model[0].parameters(), expected, strict=False):
        # Sums of four chunks, in single precision.
        assert torch.allclose(p.grad, gradient, rtol=1e-5)
