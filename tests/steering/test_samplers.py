"""Batches of changing size serve every sample exactly once, and resume at any batch."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from stableopt import AdaptiveAccumulation, AdaptiveBatchSampler

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=30)


class Indices(Dataset):
    """Item i is i, so that what a loader gives can be checked."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def shuffled(n: int, seed: int = 0) -> RandomSampler:
    return RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))


def changing(sampler: AdaptiveBatchSampler, batches: Iterator, sizes: list[int]) -> list[Any]:
    """Return all batches; the size is set to the next of ``sizes`` before each one is asked for."""
    served = []
    for turn in range(10**6):
        sampler.batch_size = sizes[turn % len(sizes)]
        batch = next(batches, None)
        if batch is None:
            return served
        served.append(batch)
    raise AssertionError("no end")


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 60), sizes=SIZES, drop_last=st.booleans())
def test_every_index_exactly_once_at_any_sizes(n: int, sizes: list[int], drop_last: bool) -> None:
    """Catches samples dropped or repeated when the size changes, and sizes that apply too late."""
    sampler = AdaptiveBatchSampler(range(n), 1, drop_last=drop_last)
    for _ in range(2):
        batches = changing(sampler, iter(sampler), sizes)
        flat = [index for batch in batches for index in batch]
        assert flat == list(range(len(flat)))  # in the sampler's order, without a gap
        for turn, batch in enumerate(batches):
            full = len(batch) == sizes[turn % len(sizes)]
            assert full or (turn == len(batches) - 1 and not drop_last)
        left = n - len(flat)
        assert left < sizes[len(batches) % len(sizes)] if drop_last else left == 0


# A worker process takes a few hundredths of a second to start.
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 40),
    sizes=SIZES,
    drop_last=st.booleans(),
    workers=st.integers(0, 4),
    prefetch=st.integers(1, 3),
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_loaders_lose_nothing(
    n: int, sizes: list[int], drop_last: bool, workers: int, prefetch: int
) -> None:
    """Catches a sampler whose state prefetching upsets: workers ask for batches far ahead."""
    sampler = AdaptiveBatchSampler(shuffled(n), 1, drop_last=drop_last)
    loader = DataLoader(
        Indices(n),
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
    )
    batches = changing(sampler, iter(loader), sizes)
    flat = [int(index) for batch in batches for index in batch]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(n))
    assert n - len(flat) < max(sizes) if drop_last else len(flat) == n


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7, 12])
def test_with_one_size_it_is_torchs(n: int, drop_last: bool) -> None:
    """Catches another order or another number of random draws than BatchSampler's."""
    ours = AdaptiveBatchSampler(shuffled(max(n, 1)), 4, drop_last=drop_last)
    theirs = BatchSampler(shuffled(max(n, 1)), 4, drop_last)
    assert isinstance(ours, BatchSampler)
    for _ in range(3):
        assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)
    torch.manual_seed(0)
    a = [*AdaptiveBatchSampler(RandomSampler(range(9)), 4), torch.rand(1)]
    torch.manual_seed(0)
    b = [*BatchSampler(RandomSampler(range(9)), 4, False), torch.rand(1)]
    assert a == b


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    sizes=SIZES,
    drop_last=st.booleans(),
    taken=st.integers(0, 60),
    ahead=st.integers(1, 5),
)
def test_resuming_at_any_batch_gives_what_is_left(
    n: int, sizes: list[int], drop_last: bool, taken: int, ahead: int
) -> None:
    """Catches a resumed epoch that repeats or skips prefetched batches.

    Also catches a ``state_dict`` that changes the run it was taken from.
    """
    sampler = AdaptiveBatchSampler(shuffled(n), 1, drop_last=drop_last)
    batches, before = iter(sampler), []
    for turn in range(taken + ahead):
        sampler.batch_size = sizes[turn % len(sizes)]
        batch = next(batches, None)
        if batch is None:
            break
        before.append(batch)
    taken = min(taken, len(before))
    state = json.loads(json.dumps(sampler.state_dict(batches=taken)))
    rest = list(batches)  # the run that goes on
    used = [index for batch in before[:taken] for index in batch]
    unused = [index for batch in [*before[taken:], *rest] for index in batch]

    resumed = AdaptiveBatchSampler(shuffled(n, seed=9), 1, drop_last=drop_last)
    resumed.load_state_dict(state)
    assert resumed.batch_size == sampler.batch_size
    again = [index for batch in resumed for index in batch] if state["rest"] else []
    # What follows the prefetched batches may be cut elsewhere, so that another rest is dropped.
    assert again[: len(unused)] == unused[: len(again)]
    assert abs(len(again) - len(unused)) < max(sizes) if drop_last else again == unused
    assert sorted(used + again) == list(range(n)) or drop_last
    # The epoch after it is a whole one.
    assert len([index for batch in resumed for index in batch]) > n - max(sizes)


def test_a_resumed_loader_with_workers_gives_the_batches_that_were_not_taken() -> None:
    """Catches a state that counts prefetched batches as trained on."""
    sampler = AdaptiveBatchSampler(shuffled(40), 3)
    loader = DataLoader(Indices(40), batch_sampler=sampler, num_workers=2, prefetch_factor=2)
    batches = iter(loader)
    taken = [next(batches).tolist() for _ in range(4)]
    state = sampler.state_dict(batches=4)
    rest = [batch.tolist() for batch in batches]
    sampler.load_state_dict(state)
    assert len(loader) == 10  # 28 samples
    assert [batch.tolist() for batch in loader] == rest
    assert sorted(sum(taken + rest, [])) == list(range(40))  # noqa: RUF017
    assert len(loader) == 14


def test_a_resumed_epoch_can_be_saved_and_resumed_again() -> None:
    """Catches a state that is lost when nothing was read since it was loaded."""
    sampler = AdaptiveBatchSampler(range(10), 3)
    batches = iter(sampler)
    next(batches)
    state = sampler.state_dict()
    other = AdaptiveBatchSampler(range(10), 3)
    other.load_state_dict(state)
    assert other.state_dict() == state
    batches = iter(other)
    assert next(batches) == [3, 4, 5]
    other.load_state_dict(other.state_dict())
    assert list(other) == [[6, 7, 8], [9]]
    assert list(other) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_a_finished_epoch_resumes_as_a_new_one() -> None:
    """Catches an empty epoch after resuming from a checkpoint between two epochs."""
    sampler = AdaptiveBatchSampler(range(5), 2)
    list(sampler)
    sampler.load_state_dict(sampler.state_dict())
    assert len(list(sampler)) == 3
    fresh = AdaptiveBatchSampler(range(5), 2)
    fresh.load_state_dict(fresh.state_dict())
    assert len(list(fresh)) == 3


def test_two_iterators_do_not_mix() -> None:
    """Catches a second loop over the loader, as for validation, that takes batches from the first."""
    sampler = AdaptiveBatchSampler(range(6), 2)
    first = iter(sampler)
    assert next(first) == [0, 1]
    second = iter(sampler)
    assert next(second) == [0, 1]
    assert next(first) == [2, 3]
    sampler.state_dict()
    assert list(second) == [[2, 3], [4, 5]]
    assert list(first) == [[4, 5]]


def test_set_epoch_reaches_a_distributed_sampler() -> None:
    """Catches the same order in every epoch, and a crash over samplers without epochs."""

    def replicas(seed: int) -> list[AdaptiveBatchSampler]:
        return [
            AdaptiveBatchSampler(DistributedSampler(range(11), 2, rank, seed=seed), 2)
            for rank in (0, 1)
        ]

    epochs = []
    for epoch in (0, 1):
        orders = []
        for sampler in replicas(seed=0):
            sampler.set_epoch(epoch)
            orders.append([index for batch in sampler for index in batch])
        epochs.append(orders)
        # Twelve in all: the sampler repeats one to make ranks equal.
        assert sorted(set(sum(orders, []))) == list(range(11))  # noqa: RUF017
    assert epochs[0] != epochs[1]
    AdaptiveBatchSampler(SequentialSampler(range(3)), 2).set_epoch(1)


@pytest.mark.parametrize(
    ("options", "size", "nearest"),
    [
        ({}, 7.4, 7),
        ({}, 0.01, 1),
        ({"min_batch_size": 4}, 1, 4),
        ({"max_batch_size": 16}, 1e9, 16),
        ({"multiple_of": 8}, 13, 16),
        ({"multiple_of": 8, "min_batch_size": 3, "max_batch_size": 30}, 29, 24),
        ({"multiple_of": 8, "min_batch_size": 3, "max_batch_size": 30}, 1, 8),
    ],
)
def test_sizes_are_kept_within_what_is_allowed(
    options: dict[str, int], size: float, nearest: int
) -> None:
    """Catches rounding past a bound."""
    sampler = AdaptiveBatchSampler(range(100), 8, **options)
    assert sampler.nearest(size) == nearest
    sampler.batch_size = nearest
    assert len(next(iter(sampler))) == nearest


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, {}), "batch_size=0"),
        ((2.0, {}), "batch_size=2.0"),
        ((True, {}), "batch_size=True"),
        ((9, {"max_batch_size": 8}), "batch_size=9: expected a multiple of 1 from 1 to 8"),
        ((9, {"multiple_of": 8}), "batch_size=9: expected a multiple of 8"),
        (
            (8, {"min_batch_size": 9, "max_batch_size": 15, "multiple_of": 8}),
            "no multiple is within these bounds",
        ),
        ((8, {"multiple_of": 0}), "multiple_of=0"),
    ],
)
def test_bad_sizes_are_refused(arguments: Any, says: str) -> None:
    """Catches a bad size that is silently replaced by a valid one."""
    size, options = arguments
    with pytest.raises(ValueError, match=says):
        AdaptiveBatchSampler(range(9), size, **options)
    good = AdaptiveBatchSampler(range(9), 3, max_batch_size=8)
    with pytest.raises(ValueError, match="batch_size=9"):
        good.batch_size = 9
    assert good.batch_size == 3


def test_bad_states_are_refused() -> None:
    """Catches a resume that silently starts from the beginning."""
    sampler = AdaptiveBatchSampler(range(9), 3)
    with pytest.raises(ValueError, match="lacks"):
        sampler.load_state_dict({"batch_size": 3})
    with pytest.raises(ValueError, match="batches=1: only 0 were requested"):
        sampler.state_dict(batches=1)
    with pytest.raises(TypeError, match="without a length"):
        AdaptiveBatchSampler((i for i in range(9)), 3).state_dict()


# -- ranks -----------------------------------------------------------------------------------------


def _rank(rank: int, folder: str) -> None:
    os.environ["MASTER_ADDR"], os.environ["GLOO_SOCKET_IFNAME"] = "localhost", "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    from stableopt.distributed.collectives import world
    from stableopt.steering.agreement import broadcast_tensors, decide_together
    from stableopt.steering.decision import Decision, DecisionLog

    sampler = AdaptiveBatchSampler(DistributedSampler(range(20), seed=3), 2)
    size = [3, 4][rank]  # rank 1 has another opinion
    batches = iter(sampler)
    served = [next(batches)]
    sampler.resize(size)
    served += list(batches)
    decision = Decision("lr", "raise", 0.1, 0.2 + rank, f"rank {rank}", step=7)
    log, sunk = DecisionLog(maxlen=9), []
    shared, memory = decide_together(
        lambda: ([decision], f"memory of {rank}"), log, sunk.append, dry_run=False
    )
    weight = torch.full((2,), float(rank))
    broadcast_tensors([weight])
    result = {
        "batches": served,
        "size": sampler.batch_size,
        "decisions": [each.to_dict() for each in shared],
        "weight": weight.tolist(),
        "memory": memory,
        "log": log.state(),
        "sunk": len(sunk),
        "world": world().size,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_ranks_agree(tmp_path: Path) -> None:
    """Catches ranks that decide for themselves: batches of different sizes, rates or weights."""
    # Forked, since importing torch again takes seconds; nothing here differentiates.
    multiprocessing.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    rank_zero, rank_one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert rank_zero["size"] == rank_one["size"] == 3
    for result in (rank_zero, rank_one):
        assert [len(batch) for batch in result["batches"]] == [2, 3, 3, 2]
    flat = sum(rank_zero["batches"] + rank_one["batches"], [])  # noqa: RUF017
    assert sorted(flat) == list(range(20))
    assert [rank_zero["sunk"], rank_one["sunk"], rank_zero["world"]] == [1, 0, 2]
    assert rank_one["weight"] == [0.0, 0.0]
    assert rank_zero["memory"] == rank_one["memory"] == "memory of 0"
    (decided,), (received,) = rank_zero["decisions"], rank_one["decisions"]
    assert decided == received
    assert (received["new"], received["why"]) == (0.2, "rank 0")
    assert rank_zero["log"] == rank_one["log"] == [decided]


# -- accumulation ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), micro=st.integers(1, 6), counts=st.lists(st.integers(1, 5), min_size=1)
)
def test_accumulation_is_the_mean_over_the_step(n: int, micro: int, counts: list[int]) -> None:
    """Catches shares that forget a ragged last batch, and a loader that ends within a step."""
    x = torch.linspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)
    loader = DataLoader(list(zip(x, x**2, strict=True)), batch_size=micro)
    accumulation = AdaptiveAccumulation(loader, micro)
    weight = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    mean, start = nn.MSELoss(), 0
    steps = iter(accumulation)
    for turn in range(10**6):
        accumulation.batch_size = micro * counts[turn % len(counts)]
        group = next(steps, None)
        if group is None:
            break
        weight.grad = None
        for share, (a, b) in group:
            (share * mean(weight * a, b)).backward()
        rows = slice(start, start + sum(len(batch[0]) for _, batch in group))
        (expected,) = torch.autograd.grad(mean(weight * x[rows], x[rows] ** 2), weight)
        # Sums of at most 30 terms of size one in float64.
        torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-14)
        start = rows.stop
    assert start == n


def test_accumulation_refuses_what_its_loader_cannot_give() -> None:
    """Catches a size between two multiples that is silently rounded."""
    batches = [torch.zeros(4)] * 3
    accumulation = AdaptiveAccumulation(batches, 4, max_batch_size=12)
    assert accumulation.batch_size == 4
    assert accumulation.nearest(7) == 8
    assert accumulation.nearest(100) == 12
    with pytest.raises(ValueError, match="batch_size=6"):
        accumulation.batch_size = 6
    with pytest.raises(ValueError, match="batch_size=6"):
        AdaptiveAccumulation(batches, 4, 6)
    accumulation.resize(8)
    assert len(accumulation) == 2
    other = AdaptiveAccumulation(batches, 4)
    other.load_state_dict(accumulation.state_dict())
    assert other.batch_size == 8
    assert list(AdaptiveAccumulation([], 4)) == []


@pytest.mark.parametrize(
    ("sizes", "micro", "whole"),
    [
        ([16, 16], 8, 0),
        ([2, 2], 8, 0),
        ([8, 8, 8, 5, 8], 8, 1),
        ([8, 5, 8, 8], 8, 0),
        ([8, 8, 9], 8, 1),
        ([8, 8, 8, 5], 8, 2),
        ([8, 8, 3], 8, 2),
        ([3], 8, 1),
    ],
)
def test_accumulation_refuses_batches_of_another_size(
    sizes: list[int], micro: int, whole: int
) -> None:
    """Catches steps of 32 samples where `batch_size` says 16, and a refused last batch."""
    accumulation = AdaptiveAccumulation([torch.zeros(n) for n in sizes], micro, 2 * micro)
    groups = []
    fits = set(sizes[:-1]) <= {micro} and sizes[-1] <= micro
    with nullcontext() if fits else pytest.raises(ValueError, match=f"micro_batch_size={micro}: a"):
        groups.extend(iter(accumulation))
    for group in accumulation if fits else ():
        assert sum(len(batch) for _, batch in group) <= accumulation.batch_size
    assert len(groups) == whole


def test_accumulation_weighs_batches_as_the_loss_does() -> None:
    """Catches weights by samples for a mean over tokens: 63 % off, without an error."""
    torch.manual_seed(0)
    x, y = torch.randint(7, (2, 16, 12))
    for row in range(16):
        y[row, 12 if row < 8 else 2 :] = -100
    y[4:8] = -100  # a batch without any target
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)).double()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    expected = torch.autograd.grad(loss(x, y), list(model.parameters()))
    with pytest.raises(ValueError, match=r"ignored targets \(-100\).*sample_weight="):
        list(AdaptiveAccumulation(batches, 4, 16))
    (group,) = AdaptiveAccumulation(
        batches, 4, 16, sample_weight=lambda batch: (batch[1] != -100).sum(1)
    )
    model.zero_grad()
    for share, batch in group:
        (share * loss(*batch)).backward()
    # Sums of some hundred terms in double precision.
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], list(expected), rtol=1e-12, atol=1e-14
    )


def test_sampler_and_workers_leave_global_random_state_alone() -> None:
    """Catches a draw that torch's BatchSampler does not make."""
    state = random.getstate()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampler = AdaptiveBatchSampler(range(8), 2)
    sampler.load_state_dict(sampler.state_dict())
    list(sampler)
    assert torch.equal(before, torch.get_rng_state())
    assert state == random.getstate()
