"""A run that is saved and resumed several times within an epoch has the uninterrupted run's batches."""

from __future__ import annotations

import copy
import json
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from stableopt import AdaptiveBatchSampler

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=20)
SAVES = st.sets(st.integers(1, 40), max_size=8)


def saved(sampler: AdaptiveBatchSampler, batches: int | None = None) -> dict[str, Any]:
    """Return the state as a checkpoint in JSON holds it."""
    return json.loads(json.dumps(sampler.state_dict(batches=batches)))


def prefetching(sampler: AdaptiveBatchSampler, prefetch: int) -> Iterator[list[int]]:
    """Yield the batches as a loader with workers does, which always has ``prefetch`` more requested."""
    requests = iter(sampler)
    queue = deque(islice(requests, prefetch))
    while True:
        queue.extend(islice(requests, 1))
        if not queue:
            return
        yield queue.popleft()


def two_epochs(
    n: int,
    sizes: list[int],
    prefetch: list[int],
    drop_last: bool = False,
    saves: set[int] | None = None,
) -> list[list[list[int]]]:
    """Return the batches of two epochs, whose size changes after every batch.

    After every number of batches in ``saves`` a new sampler loads the state, and its loader has the
    next ``prefetch``.
    """
    epochs: list[list[list[int]]] = [[], []]
    sampler = AdaptiveBatchSampler(range(n), sizes[0], drop_last=drop_last)
    epoch = resumes = 0
    while epoch < 2:
        for batch in prefetching(sampler, prefetch[resumes % len(prefetch)]):
            epochs[epoch].append(batch)
            total = sum(map(len, epochs))
            sampler.batch_size = sizes[total % len(sizes)]
            if total in (saves or ()):
                break
        else:
            epoch += 1
            continue
        state = saved(sampler, len(epochs[epoch]))
        epoch += not state["rest"]  # then the epoch was complete
        resumes += 1
        sampler = AdaptiveBatchSampler(range(n), 1, drop_last=drop_last)
        sampler.load_state_dict(state)
    return epochs


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 80),
    sizes=SIZES,
    prefetch=st.integers(0, 5),
    drop_last=st.booleans(),
    saves=SAVES,
)
def test_a_chain_of_resumes_has_the_batches_of_the_uninterrupted_run(
    n: int, sizes: list[int], prefetch: int, drop_last: bool, saves: set[int]
) -> None:
    """Catches a second resume that loses samples, and prefetched batches that are cut again."""
    uninterrupted = two_epochs(n, sizes, [prefetch], drop_last)
    assert two_epochs(n, sizes, [prefetch], drop_last, saves) == uninterrupted


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 80),
    sizes=SIZES,
    prefetch=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    saves=SAVES,
)
def test_no_sample_is_lost_when_the_prefetch_changes(
    n: int, sizes: list[int], prefetch: list[int], saves: set[int]
) -> None:
    """Catches prefetched batches that are lost when a run with fewer workers is saved before them."""
    for epoch in two_epochs(n, sizes, prefetch, saves=saves):
        assert [index for batch in epoch for index in batch] == list(range(n))


def test_two_resumes_with_persistent_workers_miss_nothing() -> None:
    """Catches a count of batches that starts at the resume, which lost eight samples here."""
    data = TensorDataset(torch.arange(32))
    sampler = AdaptiveBatchSampler(range(32), 4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, persistent_workers=True)
    seen: list[list[int]] = []
    for stop in (2, 4, 99):
        for (batch,) in loader:
            seen.append(batch.tolist())
            if len(seen) == stop:
                break
        sampler.load_state_dict(saved(sampler, len(seen)))
    assert seen == [list(range(first, first + 4)) for first in range(0, 32, 4)]


def test_prefetched_batches_keep_their_size() -> None:
    """Catches prefetched batches that are cut at the size that a controller has set since."""
    sampler = AdaptiveBatchSampler(range(50), 16)
    batches = prefetching(sampler, 2)
    next(batches)
    sampler.batch_size = 8
    state = saved(sampler, 1)
    assert state == {
        "batch_size": 8,
        "rest": list(range(16, 50)),
        "ahead": [16, 16],
        "taken": 1,
    }
    resumed = AdaptiveBatchSampler(range(50), 4)
    resumed.load_state_dict(state)
    assert len(resumed) == 3
    assert [len(batch) for batch in resumed] == [len(batch) for batch in batches] == [16, 16, 2]
    # Without workers nothing is requested ahead, so that a save may come between the two.
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert saved(resumed, 2) == {**state, "rest": list(range(32, 50)), "ahead": [16], "taken": 2}


def test_the_length_counts_prefetched_batches_and_drops_only_a_last_short_one() -> None:
    """Catches a length of the samples at the new size, as if nothing had been prefetched."""
    state = {"batch_size": 3, "rest": list(range(20)), "ahead": [6, 6], "taken": 4}
    for drop_last, batches in ((False, 5), (True, 4)):
        sampler = AdaptiveBatchSampler(range(50), 1, drop_last=drop_last)
        sampler.load_state_dict(state)
        assert len(sampler) == batches == len(list(sampler))


def test_a_state_that_was_only_loaded_is_saved_as_it_was() -> None:
    """Catches a save before the first batch that starts the epoch again or counts from zero."""
    sampler = AdaptiveBatchSampler(range(30), 4)
    batches = prefetching(sampler, 2)
    taken = [next(batches), next(batches)]
    state = saved(sampler, len(taken))
    for _ in range(2):
        sampler.load_state_dict(state)
        assert saved(sampler) == saved(sampler, 2) == state
    other = {"batch_size": 5, "rest": [7, 8, 9], "ahead": [], "taken": 6}
    sampler.load_state_dict(other)
    assert saved(sampler) == other
    assert list(sampler) == [[7, 8, 9]]


def test_batches_are_counted_from_the_start_of_each_epoch() -> None:
    """Catches an epoch that counts on from an earlier one, and a wrong count that is not refused."""
    sampler = AdaptiveBatchSampler(range(10), 2)
    next(iter(sampler))
    sampler.load_state_dict(saved(sampler, 1))
    batches = iter(sampler)
    next(batches)
    with pytest.raises(ValueError, match="batches=0: the loaded state was saved after 1 batches"):
        sampler.state_dict(batches=0)
    with pytest.raises(ValueError, match="batches=3: only 2 were requested"):
        sampler.state_dict(batches=3)
    assert saved(sampler) == saved(sampler, 2)
    list(batches)
    assert saved(sampler, 5)["rest"] == []
    next(iter(sampler))  # a new epoch
    assert saved(sampler, 1)["rest"] == list(range(2, 10))
    assert saved(sampler)["taken"] == 1


def test_a_complete_epoch_replaces_the_position_of_an_earlier_one() -> None:
    """Catches a sampler that, after it has loaded a complete epoch, saves the position from before."""
    complete = AdaptiveBatchSampler(range(10), 2)
    list(complete)
    sampler = AdaptiveBatchSampler(range(10), 2)
    next(iter(sampler))
    sampler.load_state_dict(saved(complete, 5))
    assert saved(sampler) == {"batch_size": 2, "rest": [], "ahead": [], "taken": 0}
    next(iter(sampler))
    assert saved(sampler, 1)["rest"] == list(range(2, 10))


def test_a_save_does_not_end_an_epoch_that_a_second_loop_interrupts() -> None:
    """Catches a loop that ends early since a state was saved before another loop began."""
    sampler = AdaptiveBatchSampler(range(6), 2)
    first = iter(sampler)
    next(first)
    sampler.state_dict()
    assert len(list(sampler)) == 3
    assert list(first) == [[2, 3], [4, 5]]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))]
)
def test_a_copy_of_a_resumed_sampler_has_its_position(
    copied: Callable[[Any], Any], started: bool
) -> None:
    """Catches copies that lose the prefetched sizes or the count, or share them with the original."""
    state = {"batch_size": 2, "rest": list(range(9)), "ahead": [4, 3], "taken": 5}
    sampler = AdaptiveBatchSampler(range(20), 1)
    sampler.load_state_dict(state)
    batches = iter(sampler)
    if started:
        next(batches)
    before = saved(sampler)
    assert (before["ahead"], before["taken"]) == (([3], 6) if started else ([4, 3], 5))
    other, again = copied(sampler), copied(sampler)
    assert saved(other) == before
    rest = list(batches)
    assert saved(other) == before
    other.load_state_dict(before)
    assert list(other) == rest
    assert saved(sampler)["rest"] == []
    # A second loop over a sampler whose epoch has started is a new epoch, also for a copy.
    assert sum(map(len, again)) == (20 if started else 9)


def test_whole_epoch_leaves_a_resumed_position_alone() -> None:
    """Catches a measurement that uses up the prefetched batches of a loaded state."""
    state = {"batch_size": 5, "rest": [7, 8, 9], "ahead": [2], "taken": 3}
    sampler = AdaptiveBatchSampler(range(10), 5)
    sampler.load_state_dict(state)
    assert list(sampler.whole_epoch()) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert saved(sampler) == state
    assert list(sampler) == [[7, 8], [9]]


def test_states_of_earlier_versions_are_read() -> None:
    """Catches a checkpoint without the new entries that is refused."""
    sampler = AdaptiveBatchSampler(range(10), 5)
    sampler.load_state_dict({"batch_size": 2, "rest": [7, 8, 9]})
    batches = iter(sampler)
    assert next(batches) == [7, 8]
    assert saved(sampler, 1) == {"batch_size": 2, "rest": [9], "ahead": [], "taken": 1}


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"ahead": [2, 2]}, r"ahead=\[2, 2\]: expected at most 3 samples"),
        ({"ahead": [0]}, "ahead=0: expected a whole number"),
        ({"taken": -1}, "taken=-1: expected a whole number"),
        ({"taken": None}, "taken=None: expected a whole number"),
        ({"batch_size": 99}, "batch_size=99"),
    ],
)
def test_refused_states_change_nothing(entries: dict[str, Any], says: str) -> None:
    """Catches a state that is read in part before it is refused."""
    sampler = AdaptiveBatchSampler(range(10), 2, max_batch_size=8)
    batches = prefetching(sampler, 1)
    next(batches)
    before = saved(sampler, 1)
    bad = {"batch_size": 4, "rest": [7, 8, 9], "ahead": [2], "taken": 3, **entries}
    with pytest.raises(ValueError, match=says):
        sampler.load_state_dict(bad)
    assert saved(sampler, 1) == before
    sampler.load_state_dict(before)
    with pytest.raises(ValueError, match=says):
        sampler.load_state_dict(bad)
    assert saved(sampler) == before
    assert list(sampler) == list(batches)
