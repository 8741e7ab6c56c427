"""Batches whose samples are not in the first dimension: a layout changes no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stableopt
from stableopt.curvature import DualCurvature, Hessian, NonUniformity, Problem
from stableopt.curvature.problem.data.layout import Layout

pytestmark = pytest.mark.usefixtures("double_by_default")

T, N = 5, 7


class TimeFirst(nn.Module):
    """A recurrent network, with an output at each position, or at the last one."""

    def __init__(self, *, at_each_position: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.at_each_position = nn.RNN(3, 4), nn.Linear(4, 2), at_each_position

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.head(states if self.at_each_position else states[-1])


class SamplesFirst(nn.Module):
    """The same network on batches ``(n, T, ...)``."""

    def __init__(self, inner: TimeFirst) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.inner(x.transpose(0, 1))
        return outputs.transpose(0, 1) if self.inner.at_each_position else outputs


def numbers(*args: Any, **options: Any) -> Tensor:
    """Return a product with H, one with Sigma, and the Gram matrix, which gives critical_lr."""
    problem = Problem(*args, **options)
    v = torch.ones(problem.num_params)
    gram = DualCurvature.from_problem(problem).gram
    return torch.cat([Hessian(problem) @ v, NonUniformity(problem) @ v, gram.flatten()])


x = torch.randn(T, N, 3, generator=torch.Generator().manual_seed(0)).double()
TARGETS = {
    "an output at each position": (True, x[..., :2].sin(), 1, nn.MSELoss()),
    "classes": (False, torch.arange(N) % 2, 1, nn.CrossEntropyLoss()),
    "targets with the samples first": (False, x[0, :, :2].cos(), (1, 0), nn.MSELoss()),
}


@pytest.mark.parametrize("target", TARGETS)
def test_time_first_data_have_the_numbers_of_samples_first(target: str) -> None:
    """Catches time steps taken for samples, which changes s and the critical learning rate: with
    chunks cut by the reader or the user, with a loader, and with a data set that is stacked.
    """
    at_each_position, y, dim, loss_fn = TARGETS[target]
    moves = isinstance(dim, int) and y.dim() > dim
    network = TimeFirst(at_each_position=at_each_position)
    y_samples_first = y.transpose(0, 1) if moves else y
    expected = numbers(SamplesFirst(network), loss_fn, (x.transpose(0, 1), y_samples_first))
    y_dim = 1 if moves else 0
    batches = list(zip(x.split([3, 4], 1), y.split([3, 4], y_dim), strict=True))
    samples = TensorDataset(x.transpose(0, 1), y_samples_first)
    loader = DataLoader(
        samples,
        batch_size=3,
        shuffle=True,
        collate_fn=lambda pairs: (
            torch.stack([a for a, _ in pairs], 1),
            torch.stack([b for _, b in pairs], y_dim),
        ),
    )
    for data, chunk_size in (
        ((x, y), None),
        ((x, y), 2),
        (batches, None),
        (loader, None),
        (samples, 3),
    ):
        actual = numbers(network, loss_fn, data, batch_dim=dim, chunk_size=chunk_size)
        # Double precision, and sums in another order.
        assert relative_error(actual, expected) < 1e-12


def test_weights_and_batch_losses_see_the_layout_given() -> None:
    """Catches a function of the user's that gets batches with the samples first."""
    network, y = TimeFirst(at_each_position=True), x[..., :2].sin()

    def weight(batch: Any) -> Tensor:
        assert batch[0].shape[0] == T
        return batch[0].abs().sum((0, 2))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        assert outputs.shape[0] == targets.shape[0] == T
        sample_losses = (outputs - targets).square().mean((0, 2))
        w = targets.arcsin().abs().sum((0, 2))
        return (sample_losses * w).sum() / w.sum()

    def weight_of_targets(batch: Any) -> Tensor:
        return batch[1].arcsin().abs().sum((0, 2))

    weighted = Problem(network, loss, (x, y), batch_dim=1, sample_weight=weight_of_targets)
    assert weighted.value() == pytest.approx(loss(network(x), y).item(), rel=1e-12)
    with pytest.raises(ValueError, match="sample_weight: with these weights"):
        Problem(network, loss, (x, y), batch_dim=1, sample_weight=weight, chunk_size=2)
    by_batch = Problem.from_batch_loss(
        network,
        lambda model, batch: nn.functional.mse_loss(model(batch["x"]), batch["y"]),
        {"x": x, "y": y},
        batch_dim=1,
        chunk_size=2,
    )
    pairs = Problem(network, nn.MSELoss(), (x, y), batch_dim=1)
    assert by_batch.num_samples == pairs.num_samples == N
    assert by_batch.value() == pytest.approx(pairs.value(), rel=1e-12)


def test_the_monitor_counts_samples_and_not_steps() -> None:
    """Catches the number of time steps taken for the batch size, which makes limits wrong."""
    network, y = TimeFirst(at_each_position=True), x[..., :2].sin()
    optimizer = stableopt.SGD(network.parameters(), lr=0.1)
    optimizer.track(network, nn.MSELoss(), (x, y), batch_dim=1, every=1)
    nn.MSELoss()(network(x[:, :4]), y[:, :4]).backward()
    optimizer.step()
    assert optimizer.margins is not None
    assert optimizer.margins.batch_size == 4


@pytest.mark.parametrize(
    ("dim", "paired"), [(-1, True), (0.5, True), ((1, 0, 0), True), ((1, 0), False), (True, True)]
)
def test_other_values_are_named(dim: Any, paired: bool) -> None:
    """Catches a dimension that fails deep inside of a reading."""
    with pytest.raises(ValueError, match="batch_dim="):
        Layout.of(dim, paired=paired)
