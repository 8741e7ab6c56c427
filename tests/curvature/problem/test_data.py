"""Every form of data gives the same samples."""

from __future__ import annotations

import pytest
import torch
from oracles import (
    PRODUCT,
    covariance,
    dense_hessians,
    eye,
    relative_error,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Problem,
)


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
