"""The probe is one fixed set of samples: finite, the same at each reading, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

import stableopt
from stableopt.curvature import Hessian, NonUniformity, Problem, top_eigenpair
from stableopt.curvature.problem.data import batches as data_module
from stableopt.curvature.problem.data import probe
from stableopt.curvature.problem.data.probe import fixed_probe

X, Y = torch.arange(24.0).double().view(12, 2) / 12, torch.zeros(12, 1).double()


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from zip(X, Y, strict=True)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Draws from the process's generator, as torchvision's transforms do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + torch.rand(2), Y[index]


class Batched:
    """A re-iterable that shuffles by a hidden state: each reading continues where the last ended."""

    def __init__(self) -> None:
        self._orders = iter([torch.randperm(12) for _ in range(99)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = next(self._orders)
        yield X[order[:6]], Y[order[:6]]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


def inputs(data: Any, **options: Any) -> Tensor:
    batches = fixed_probe(data, chunk_size=None, paired=True, **options)
    first_pass, second_pass = (torch.cat([batch[0] for batch, _ in batches]) for _ in range(2))
    assert torch.equal(first_pass, second_pass)
    assert len(first_pass) == batches.num_samples
    return first_pass


def test_one_draw_of_a_weighted_sampler_is_measured_by_all_methods() -> None:
    """Catches another draw at each product: 1.67 and 2.31 came from one problem, both converged."""
    weights = (torch.rand(12, generator=torch.Generator().manual_seed(1)) ** 3).tolist()
    loader = DataLoader(TensorDataset(X, Y), 4, sampler=WeightedRandomSampler(weights, 8))
    with pytest.warns(UserWarning, match="8 samples, drawn once, are the fixed probe"):
        problem = Problem(linear(), nn.MSELoss(), loader)
    drawn = torch.cat([batch[0] for batch, _ in problem.batches])
    inputs = torch.cat([drawn, torch.ones(8, 1)], 1).double()
    expected = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 8)[-1])
    # Both are converged to the solver's rounding.
    assert top_eigenpair(Hessian(problem), tol=1e-10).value == pytest.approx(expected, rel=1e-9)
    spread = [
        top_eigenpair(NonUniformity(problem, method=method), tol=1e-10).value
        for method in ("structured", "vmap", "loop")
    ]
    assert spread == pytest.approx([spread[0]] * 3, rel=1e-9)


def test_another_order_is_no_choice() -> None:
    """Catches a warning where each epoch has the same samples."""
    sampler = torch.utils.data.SubsetRandomSampler([1, 4, 6])
    samples = inputs(DataLoader(TensorDataset(X, Y), 2, sampler=sampler))
    assert sorted(samples[:, 0].tolist()) == X[[1, 4, 6], 0].tolist()


@pytest.mark.parametrize("data", [Noisy(), Batched()], ids=["process's generator", "hidden state"])
def test_random_content_is_read_once_and_said(data: Any) -> None:
    """Catches augmentation that differs between the two sides of one product."""
    with pytest.warns(UserWarning, match="reading it draws random numbers"):
        inputs(data)


def test_random_content_that_cannot_be_read_again_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a probe that fills the memory, and an error without a remedy."""
    monkeypatch.setattr(probe, "_MOST_BYTES", 64)
    with pytest.raises(ValueError, match=r"6 samples take .* expected max_samples="):
        inputs(Batched())
    with pytest.warns(UserWarning, match="2 samples, drawn once"):
        assert len(inputs(Batched(), max_samples=2)) == 2


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """Counts what is read, and draws by that count."""

    read = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return X[index] + self.read, Y[index]


def test_what_does_not_fit_is_read_again_from_the_same_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches measurements that advance the counter of the data set that training reads."""
    monkeypatch.setattr(probe, "_MOST_BYTES", 64)
    data = Counted()
    data.read = 5
    with pytest.warns(UserWarning, match="12 samples, drawn once"):
        batches = fixed_probe(data, chunk_size=None, paired=True)
    data.read = 7  # training goes on
    samples = torch.cat([batch[0] for batch, _ in batches])
    assert torch.equal(samples, X + torch.arange(6, 18)[:, None])
    assert data.read == 7


def test_endless_data_are_refused_or_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an endless stream that is read forever."""
    monkeypatch.setattr(data_module, "MOST_UNSIZED", 100)
    optimizer = stableopt.GD(linear().parameters(), lr=0.1)
    for read in (
        lambda: Problem(linear(), nn.MSELoss(), Endless()),
        lambda: Problem(linear(), nn.MSELoss(), DataLoader(Endless(), batch_size=5)),
        lambda: optimizer.full_gradient(linear(), nn.MSELoss(), Endless()),
    ):
        with pytest.raises(ValueError, match=r"no end in sight: expected max_samples="):
            read()
    loader = DataLoader(Endless(), batch_size=5)
    assert torch.equal(inputs(loader, max_samples=7), X[:7])
    assert stableopt.measure(linear(), nn.MSELoss(), loader, max_samples=7).dataset_size == 7


@pytest.mark.parametrize(
    "data",
    [(X, Y), TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True)],
    ids=["tensors", "data set", "loader"],
)
def test_max_samples_is_one_choice_spread_over_the_data(data: Any) -> None:
    """Catches the first samples of sorted data, and a choice that depends on the form of the data."""
    chosen = inputs(data, max_samples=7)
    assert torch.equal(chosen, inputs((X, Y), max_samples=7))
    assert len(chosen) == 7
    assert not torch.equal(chosen, X[:7])
    assert torch.equal(inputs(data, max_samples=100), X)


def test_batches_are_cut_at_max_samples() -> None:
    """Catches a bound on batches rather than on samples."""
    assert torch.equal(inputs([(X[:5], Y[:5]), (X[5:], Y[5:])], max_samples=7), X[:7])
    with pytest.raises(ValueError, match="max_samples=0"):
        inputs((X, Y), max_samples=0)
