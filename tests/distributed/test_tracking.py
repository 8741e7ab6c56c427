"""A monitor of replicas takes one decision for all ranks and leaves training unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import small_data, small_network
from rank_processes import run, shard
from rank_workers.monitoring import clocks, closed, counted, failing, isolated, tracking
from rank_workers.shares import SAMPLES
from torch import nn

from stableopt import measure


def test_replicas_are_tracked(tmp_path: Path) -> None:
    """Catches a monitor that measures a rank's own samples, counts its own batches only, writes a
    record for each rank, or disturbs the training.
    """
    zero, one = run(tracking, 2, tmp_path)
    assert zero["untouched"]
    assert one["untouched"]
    assert zero["failures"] == one["failures"] == [None] * 3
    assert zero["steps"] == one["steps"] == [2, 4, 6]
    assert zero["received"] == [2, 4, 6]
    assert one["received"] == []
    assert zero["batch"] == one["batch"] == 5
    assert zero["samples"] == one["samples"] == SAMPLES
    model = small_network()
    for p, weights in zip(model.parameters(), zero["weights"], strict=True):
        p.data.copy_(torch.tensor(weights, dtype=torch.float64))
    alone = measure(
        model,
        nn.MSELoss(),
        small_data(SAMPLES),
        lr=0.2,
        batch_size=5,
        quantities=["sharpness", "non_uniformity"],
        tol=1e-9,
        max_iter=300,
    )
    for found in (zero, one):
        # The error of a Ritz value is the square of a residual of 1e-9, from any start.
        assert found["sharpness"] == pytest.approx(alone.sharpness, rel=1e-9)
        assert found["non_uniformity"] == pytest.approx(alone.non_uniformity, rel=1e-9)


def test_rank_0_says_when(tmp_path: Path) -> None:
    """Catches ranks that each go by their own clock: the first to measure would wait forever."""
    zero, one = run(clocks, 2, tmp_path)
    assert zero == one
    assert 2 <= len(zero) < 24


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    """Catches a rank that waits for one that has raised, and ranks out of step afterwards."""
    zero, one = run(failing, 2, tmp_path)
    assert "sample 5" in one["broken"]
    assert zero["broken"] == "KeyError: \"on rank 1: 'sample 5'\""
    assert [zero["broken warned"], one["broken warned"]] == [1, 0]
    for found in (zero, one):
        assert found["before"] is found["after"] is None
        assert found["nan"].startswith("not finite")
        assert found["empty"].startswith("ValueError")
        assert "data is empty" in found["empty"]
        assert "its parameters are not the same on all ranks" in found["other weights"]
        assert found["ranks still agree"] == SAMPLES


def test_what_fails_on_one_rank_leaves_other_quantities_standing(tmp_path: Path) -> None:
    """Catches a rank that goes on to the next quantity while the others wait in a collective of the
    last one, and a failure that takes the sharpness with it.
    """
    ranks = run(isolated, 3, tmp_path)
    alone = measure(
        small_network(),
        nn.MSELoss(),
        small_data(SAMPLES),
        quantities=["sharpness", "non_uniformity"],
        tol=1e-9,
        max_iter=300,
    )
    for rank, found in enumerate(ranks):

        def by(failed: int, rank: int = rank) -> str:
            return "" if rank == failed else f"on rank {failed}: "

        quoted = "'sample 5'" if rank == 1 else "\"on rank 1: 'sample 5'\""
        assert found["failures"] == {
            "between": f"MemoryError: {by(1)}out of memory",
            "within": f"KeyError: {quoted}",
            "at_the_end": f"ZeroDivisionError: {by(2)}no noise",
            "on_all": "ValueError: undefined",
        }
        # The error of a Ritz value is the square of a residual of 1e-9, from any start.
        assert found["sharpness"] == pytest.approx(alone.sharpness, rel=1e-9)
        assert found["non_uniformity"] == pytest.approx(alone.non_uniformity, rel=1e-9)


def test_shards_are_unequal_and_none_is_empty() -> None:
    """Catches shards that test nothing."""
    for size in (2, 3):
        sizes = [len(range(SAMPLES)[shard(SAMPLES, rank, size)]) for rank in range(size)]
        assert sum(sizes) == SAMPLES
        assert min(sizes) > 0
        assert len(set(sizes)) > 1


def test_ranks_agree_on_the_dimension_of_samples(tmp_path: Path) -> None:
    """Catches ranks that wait for each other, and two time steps of a rank with one sample taken for
    samples.
    """
    assert run(counted, 2, tmp_path) == [6, 6]


def test_a_sink_closes_the_monitor_on_every_rank(tmp_path: Path) -> None:
    """Catches a monitor that its sink closes on rank 0, where sinks run, while other ranks wait for it:
    after a measurement, and after a decision of steering.
    """
    assert run(closed, 2, tmp_path) == [{"measured": [2, True], "decided": [3, True]}] * 2
