"""Samples of a step under losses that call the model themselves: passes that count, and unknown ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import stableopt
from stableopt import Problem, StabilityMonitor

Loss = Callable[[nn.Module, Any], Tensor]

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def train(
    loss: Loss, data: Any = X, model: nn.Module | None = None, size: int = 8, **options: Any
) -> StabilityMonitor:
    """Take two steps on batches of ``size`` samples; return the monitor."""
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = Problem.from_batch_loss(model, loss, data, chunk_size=12)
    quantities = ("sharpness", "non_uniformity")
    with StabilityMonitor(optimizer, problem, every=1, quantities=quantities, **options) as monitor:
        for start in (0, size):
            optimizer.zero_grad()
            loss(model, data[start : start + size]).backward()
            optimizer.step()
    return monitor


def with_targets(model: nn.Module, x: Tensor) -> Tensor:
    """Like double Q-learning, and pseudo-labels: the model computes its own targets."""
    with torch.no_grad():
        target = model(x.flip(0)).argmax(1)
    return functional.cross_entropy(model(x), target)


def by_samples(model: nn.Module, x: Tensor) -> Tensor:
    """Like a physics-informed network: one function of one sample, mapped over the batch."""
    params = dict(model.named_parameters())

    def u(sample: Tensor) -> Tensor:
        return functional_call(model, params, (sample[None],))[0, 0]

    return vmap(lambda sample: grad(u)(sample)[0] + u(sample))(x).square().mean()


def meta_gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The loss after a step along the loss's own gradient."""
    params = dict(model.named_parameters())
    inner = functional_call(model, params, (x,)).square().mean()
    slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), slopes, strict=True)}
    return functional_call(model, moved, (x,)).square().mean()


def time_first(model: nn.Module, x: Tensor) -> Tensor:
    """Sequences of three steps, with time as the model's first dimension."""
    return model(torch.stack([x, -x, x / 2])).sum(0).square().mean()


@pytest.mark.parametrize("loss", [with_targets, by_samples, meta_gradient, time_first])
def test_each_sample_counts_once(loss: Loss) -> None:
    """Catches passes without gradients that divide the batch size, the slices of vmap that its shapes
    do not show, a pass of a failed attempt to evaluate the loss, and time steps taken for samples.
    """
    if loss in (by_samples, time_first):
        monitor = train(loss)
    else:  # a sample whose targets, or step, depend on its batch
        problem_loss: Loss = loss
        monitor = train(lambda m, x: torch.stack([problem_loss(m, row[None]) for row in x]).mean())
    assert [margins.batch_size for margins in monitor.history] == [8, 8]


def of_graphs(model: nn.Module, indices: Tensor) -> Tensor:
    """Batched graphs of two, three or four nodes, all in one first dimension."""
    nodes = torch.cat([X[int(i)].expand(2 + int(i) % 3, 4) for i in indices])
    graph = torch.cat([torch.full((2 + int(i) % 3,), row) for row, i in enumerate(indices)])
    outputs = model(nodes.to(next(model.parameters()).dtype))
    return outputs.new_zeros(len(indices), 2).index_add(0, graph, outputs).square().mean()


def of_a_list(model: nn.Module, x: Tensor) -> Tensor:
    """A list of samples, as for detection, whose first dimension is not theirs."""
    return torch.stack([out.square().mean() for out in model(list(x))]).mean()


class OfLists(nn.Module):
    """A layer that takes a list of samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 2)

    def forward(self, samples: list[Tensor]) -> list[Tensor]:
        return [self.layer(sample[None]) for sample in samples]


@pytest.mark.parametrize(
    ("loss", "data", "model"),
    [(of_graphs, torch.arange(23), network), (of_a_list, X, OfLists)],
    ids=["graphs", "lists"],
)
def test_inputs_without_a_dimension_of_samples_leave_the_batch_size_unknown(
    loss: Loss, data: Tensor, model: Callable[[], nn.Module]
) -> None:
    """Catches nodes, or features, taken for samples: a limit that is too high by their number's root."""
    with pytest.warns(RuntimeWarning, match=r"not a multiple of the batch size; pass batch_size="):
        monitor = train(loss, data, model())
    assert monitor.batch_size is None
    assert monitor.margins is not None
    assert monitor.margins.non_uniformity is not None
    assert monitor.margins.stable is None
    given = train(loss, data, model(), batch_size=8)
    assert given.margins is not None
    assert given.margins.non_uniformity_ratio is not None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_of_a_loss_count_their_samples(layout: torch.layout) -> None:
    """Catches an error where samples differ in a dimension, which then has no size of its own."""
    model, x = nn.Linear(4, 2), X.view(8, 3, 4)
    lengths = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2])

    def of_sequences(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows = [row[: int(length)] for row, length in zip(*batch, strict=True)]
        outputs = model(torch.nested.as_nested_tensor(rows, layout=layout)).unbind()
        return torch.stack([output.square().mean() for output in outputs]).mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    problem = Problem.from_batch_loss(model, of_sequences, [(x, lengths)])
    with StabilityMonitor(optimizer, problem, every=5) as monitor:
        of_sequences(model, (x[:5], lengths[:5])).backward()
        optimizer.step()
    assert monitor.batch_size == 5


def test_a_loss_that_differentiates_is_evaluated() -> None:
    """Catches values at constants, which a gradient penalty cannot differentiate."""
    model = network()

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        base = model(x).square().mean()
        slopes = torch.autograd.grad(base, list(model.parameters()), create_graph=True)
        return base + 0.1 * sum(slope.square().sum() for slope in slopes)

    problem = Problem.from_batch_loss(model, penalised, X, chunk_size=24)
    assert problem.value() == pytest.approx(float(penalised(model, X).detach()), rel=1e-6)
    found = stableopt.critical_sharpness(problem)
    direction = torch.autograd.grad(penalised(model, X), list(model.parameters()))
    start = problem.value()
    for factor, rises in ((0.98, False), (1.02, True)):
        moved = [
            p.detach() - factor * found.lr * g
            for p, g in zip(model.parameters(), direction, strict=True)
        ]
        assert (problem.value(tuple(moved)) > start) == rises
