"""Batches of changing size serve every sample exactly once, and resume at any batch."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from stableopt import AdaptiveBatchSampler

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=30)


class Indices(Dataset):
    """Item i is i, so that what a loader gives can be checked."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Zeros:
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


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


def pickled(original: Any) -> Any:
    return pickle.loads(pickle.dumps(original))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_within_an_epoch_continues_as_the_original(copied: Callable[[Any], Any]) -> None:
    """Catches a sampler that cannot be copied once it was iterated, and a copy that takes indices from
    the original.
    """
    sampler = AdaptiveBatchSampler(RandomSampler(range(10)), 3)
    loader = DataLoader(Indices(10), batch_sampler=sampler)
    batches = iter(loader)
    next(batches)
    copied(loader)
    other, again = copied(sampler), copied(sampler)
    state = other.state_dict(batches=1)
    assert state == sampler.state_dict(batches=1)
    other.load_state_dict(state)
    assert list(other) == [batch.tolist() for batch in batches]
    assert len(list(again)) == 4  # as a second loop over the original: a whole epoch
    endless = AdaptiveBatchSampler(Zeros(), 2)
    next(iter(endless))
    assert next(iter(copied(endless))) == [0, 0]


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
    with pytest.raises(TypeError):
        sampler.load_state_dict({"batch_size": 2, "rest": None})
    assert sampler.batch_size == 3
    with pytest.raises(ValueError, match="batches=1: only 0 were requested"):
        sampler.state_dict(batches=1)
    with pytest.raises(TypeError, match="expected a sampler with a length"):
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
        lambda: ([decision], f"memory of {rank}"),
        log,
        mock.Mock(deliver=sunk.append),
        dry_run=False,
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
