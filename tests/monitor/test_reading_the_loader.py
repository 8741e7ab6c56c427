"""Reading the training loader for a probe set changes no sample that training sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from monitored_runs import linear
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

import stableopt

N = 24
X, Y = torch.arange(2.0 * N).view(N, 2) / N, torch.linspace(-1, 1, N)[:, None]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise from a generator of its own, as augmentation libraries draw it."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + torch.from_numpy(self.rng.normal(size=2)).float(), Y[index]


class Counting(Sampler[int]):
    """An order for each epoch, which it counts itself."""

    epoch = 0

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        yield from np.random.default_rng(self.epoch).permutation(N).tolist()


class Shuffling(IterableDataset[tuple[Tensor, Tensor]]):
    """A stream in another order each time, counted at its end."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in np.random.default_rng(self.passes).permutation(N):
            yield X[index], Y[index]
        self.passes += 1


def drawn(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adaptive() -> stableopt.AdaptiveBatchSampler:
    return stableopt.AdaptiveBatchSampler(RandomSampler(range(N), generator=drawn()), 4)


def resumed() -> DataLoader[Any]:
    first = adaptive()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    second = adaptive()
    second.load_state_dict(first.state_dict())
    return DataLoader(TensorDataset(X, Y), batch_sampler=second)


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler(torch.linspace(0.1, 1, N).tolist(), N, generator=drawn())
    return DataLoader(TensorDataset(X, Y), batch_size=4, sampler=sampler)


def with_workers() -> DataLoader[Any]:
    return DataLoader(
        Augmented(),
        batch_size=4,
        shuffle=True,
        generator=drawn(),
        num_workers=1,
        persistent_workers=True,
    )


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "own generator": lambda: DataLoader(Augmented(), batch_size=4),
    "own epoch counter": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, sampler=Counting()),
    "weighted sampler": weighted,
    "persistent workers": with_workers,
    "iterable": lambda: DataLoader(Shuffling(), batch_size=4),
    "adaptive, resumed": resumed,
}


def run(loader: DataLoader[Any], tracked: bool) -> tuple[list[Tensor], list[str | None]]:
    """Return all batches and final weights of two epochs, and the failures of measurements."""
    torch.manual_seed(3)
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    monitor = optimizer.track(model, nn.MSELoss(), loader, every=2) if tracked else None
    batches = []
    for _ in range(2):
        for x, y in loader:
            batches.append(x)
            optimizer.zero_grad()
            nn.MSELoss()(model(x), y).backward()
            optimizer.step()
    failures = [] if monitor is None else [margins.failure for margins in monitor.history]
    return [*batches, *(p.detach() for p in model.parameters()), torch.get_rng_state()], failures


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", LOADERS)
def test_training_is_the_same_with_and_without_tracking(kind: str) -> None:
    """Catches a probe that advances training's generators, epoch counters or resumed positions."""
    bare, _ = run(LOADERS[kind](), tracked=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="data: .*fixed probe")
        watched, failures = run(LOADERS[kind](), tracked=True)
    assert failures
    assert set(failures) == {None}
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))


def test_a_state_saved_after_a_measurement_lists_what_is_left() -> None:
    """Catches a measurement that restarts the sampler's epoch.

    The sampler's state would then list samples that training has seen.
    """
    sampler = adaptive()
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=sampler)
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=0.01)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    monitor = optimizer.track(model, nn.MSELoss(), loader, every=1)
    nn.MSELoss()(model(X), Y).backward()
    optimizer.step()
    assert monitor.problem.num_samples == N  # of the whole epoch, not of its rest
    rest = sampler.state_dict(batches=2)["rest"]
    assert len(rest) == N - 8
    assert [x.tolist() for x, _ in batches] == [X[i].tolist() for i in torch.tensor(rest).split(4)]
