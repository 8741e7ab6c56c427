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
from stableopt.curvature.problem.data.batches import Batches


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
    hessian = Hessian(problem)
    assert problem.num_samples == 7
    assert relative_error(hessian @ eye(hessian), expected @ eye(expected)) < PRODUCT


def test_a_sampler_that_chooses_is_honoured(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches the whole data set measured where the loader serves a subset."""
    sampler = torch.utils.data.SubsetRandomSampler([1, 4, 6])
    loader = DataLoader(Rows(*data), batch_size=2, sampler=sampler)
    problem = Problem(network, nn.MSELoss(), loader)
    x, y = data
    chosen = [1, 4, 6]
    expected = Hessian(Problem(network, nn.MSELoss(), (x[chosen], y[chosen])))
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


def tensors(n: int, *features: int) -> tuple[Tensor, ...]:
    return tuple(torch.arange(n * f).reshape(n, f).double().sin() for f in features)


@pytest.mark.parametrize(
    "data",
    [
        (tensors(6, 3, 2), tensors(6, 2, 1)),
        (tensors(6, 3, 2, 1), tensors(6, 3, 2)),
        ({"a": tensors(6, 3)[0], "b": tensors(6, 2)[0]}, {"c": tensors(6, 1)[0]}),
        ((torch.zeros(6, 3).long(), torch.zeros(6, 3)), (torch.zeros(6), torch.zeros(6))),
    ],
    ids=["features", "numbers", "names", "dtypes"],
)
def test_structured_inputs_and_targets_are_a_pair(data) -> None:
    """Catches a pair whose parts are tuples, read as two batches."""
    batches = Batches(data, chunk_size=4)
    assert [size for _, size in batches] == [4, 2]
    first_batch, _ = next(iter(batches))
    assert all(type(a) is type(b) for a, b in zip(first_batch, data, strict=True))


def test_two_batches_in_a_tuple_stay_batches() -> None:
    """Catches two batches read as one pair: tuples of one kind, or of different sizes, are two
    batches.
    """
    x, y = tensors(4, 3, 1)
    with pytest.warns(UserWarning, match=r"read as two batches .* write \[\(x, y\)\]"):
        assert [size for _, size in Batches(((x, y), (x + 1, y)))] == [4, 4]
    assert [size for _, size in Batches(((x, y), (x[:2], y[:2])))] == [4, 2]
    assert [size for _, size in Batches([(x, y), (x, y)])] == [4, 4]
    words = torch.zeros(4, 5).long()
    with pytest.warns(UserWarning, match="read as two batches"):
        assert [size for _, size in Batches(((words, y), (words[:, :3], y)))] == [4, 4]


GRAPH = torch.tensor([[0, 3, 5, 9, 2], [4, 1, 9, 6, 7]])


def graph_loss(model: nn.Module, nodes: Tensor, x: Tensor, edges: Tensor, y: Tensor) -> Tensor:
    outputs = model(x.index_add(0, edges[1], x[edges[0]]))
    return nn.functional.mse_loss(outputs[nodes], y[nodes])


def test_a_graph_is_measured_by_the_numbers_of_its_nodes() -> None:
    """Catches advice that does not work: with the nodes' numbers as data, nodes are the samples."""
    torch.manual_seed(0)
    x, y, model = torch.randn(10, 3), torch.randn(10, 1), nn.Linear(3, 1)

    def loss_of_nodes(model: nn.Module, nodes: Tensor) -> Tensor:
        return graph_loss(model, nodes, x, GRAPH, y)

    problem = Problem.from_batch_loss(model, loss_of_nodes, torch.arange(10), chunk_size=4)
    rows = x.index_add(0, GRAPH[1], x[GRAPH[0]])
    rows = torch.cat([rows, torch.ones(10, 1)], 1)
    node_hessians = 2 * rows.unsqueeze(2) * rows.unsqueeze(1)
    v = torch.ones(4)
    # Single precision.
    assert relative_error(Hessian(problem) @ v, node_hessians.mean(0) @ v) < 1e-5
    sigma = (node_hessians @ node_hessians).mean(0) - node_hessians.mean(0) @ node_hessians.mean(0)
    assert relative_error(NonUniformity(problem) @ v, sigma @ v) < 1e-5


def test_a_batch_that_cannot_be_cut_is_explained() -> None:
    """Catches an IndexError of the loss's own, where it holds the edges of the whole graph."""
    x, y, model = torch.randn(10, 3), torch.randn(10, 1), nn.Linear(3, 1)

    def held_edges(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return graph_loss(model, torch.arange(len(batch["x"])), batch["x"], GRAPH, batch["y"])

    with pytest.raises(
        ValueError, match=r"fails on 8 samples .* not on all 10 .* torch.arange\(n\)"
    ):
        Problem.from_batch_loss(model, held_edges, {"x": x, "y": y})
    with pytest.raises(ValueError, match=r"have \[10, 2, 10\] samples.*torch.arange\(n\)"):
        Problem.from_batch_loss(model, held_edges, {"x": x, "edges": GRAPH, "y": y})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_with_an_alternative(layout: torch.layout) -> None:
    """Catches torch's own error, which names an operation that the user does not know of."""
    rows = [torch.zeros(2, 3), torch.zeros(1, 3)]
    x = torch.nested.as_nested_tensor(rows, layout=layout)
    for data in ((x, torch.zeros(2)), [(x, torch.zeros(2))]):
        with pytest.raises(
            TypeError, match=r"cut into samples; pass padded tensors, or the samples'"
        ):
            Problem(nn.Linear(3, 1), nn.MSELoss(), data)
