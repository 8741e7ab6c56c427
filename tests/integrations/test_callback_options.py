"""Options of the monitor that the callbacks of all frameworks take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stableopt import Problem, StabilityMonitor
from stableopt.integrations._callback import Tracked

X, Y = torch.ones(8, 2), torch.zeros(8, 1)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def started(callback: Tracked, model: nn.Module) -> StabilityMonitor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback._start(optimizer, model, loss, (X, Y), lambda *_: None, 0, lambda _: None)
    assert callback.monitor is not None
    return callback.monitor


def keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


VALUES: dict[str, Callable[[nn.Module], Any]] = {
    "params": lambda model: model.parameters(),
    "chunk_size": lambda _: 4,
    "max_samples": lambda _: 4,
    "dtype": lambda _: torch.float64,
    "sample_weight": lambda _: torch.ones(8),
    "batch_dim": lambda _: 0,
    "process_group": lambda _: None,
}


@pytest.mark.parametrize("name", sorted(keywords(StabilityMonitor) & keywords(Problem)))
def test_each_option_of_the_problem_reaches_it(name: str) -> None:
    """Catches an option of the monitor that raises when training starts, for the callback makes the
    problem itself and must know which options are the problem's.
    """
    model = nn.Linear(2, 1)
    monitor = started(Tracked((X, Y), every=1, **{name: VALUES[name](model)}), model)
    assert monitor.problem.num_samples == (4 if name == "max_samples" else 8)
    assert monitor.problem.batches.chunk_size == (4 if name == "chunk_size" else 1024)
    assert monitor.problem.dtype == (torch.float64 if name == "dtype" else torch.float32)
    monitor.close()


def test_iterators_serve_every_training() -> None:
    """Catches an iterator that the first reader has exhausted, so that a second training has none."""
    model, received = nn.Linear(2, 1), list[int]()
    callback = Tracked(
        (X, Y),
        every=1,
        params=model.parameters(),
        quantities=iter(["sharpness", "layers"]),
        blocks=iter(["weight", "bias"]),
        sinks=iter([lambda step, record: received.append(step)]),
    )
    for _ in range(2):
        monitor = started(callback, model)
        assert monitor.quantities == ("sharpness", "layers")
        assert monitor.problem.num_params == 3
        monitor.measure()
        assert monitor.margins is not None
        assert set(monitor.margins.layers.names) == {"weight", "bias"}
        monitor.close()
    assert received == [0, 0]


def test_an_unknown_option_is_refused() -> None:
    """Catches a misspelt option that changes nothing, and an option of the problem alone."""
    for name in ("max_sample", "second_derivatives"):
        with pytest.raises(TypeError, match=name):
            started(Tracked((X, Y), every=1, **{name: True}), nn.Linear(2, 1))
