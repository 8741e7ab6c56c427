"""Collectives of :class:`stableopt.distributed.collectives.Ranks` on three ranks, and on none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_processes import run
from rank_workers.collectives import collectives

from stableopt.distributed.collectives import Ranks


def test_each_collective_gives_every_rank_the_same(tmp_path: Path) -> None:
    """Catches rows out of order, the wrong source, and a whole number that float32 would round."""
    found = run(collectives, 3, tmp_path)
    assert all(one["shared"] == found[0]["shared"] for one in found)
    assert found[0]["shared"] == {
        "number": 2.0**40 + 3,
        "tensor": [6.0, 3.0],
        "mean": [(1 + 4 + 9) / 6, (1 + 2 + 3) / 6],
        "rows": [[0.0], [1.0], [1.0], [2.0], [2.0], [2.0]],
        "objects": [["rank 0"], ["rank 1"], ["rank 2"]],
        "any": [True, False],
        "tensor of 2": [2.0],
        "object of 1": {"rank": 1},
    }


def test_the_first_error_is_raised_on_every_rank(tmp_path: Path) -> None:
    """Catches ranks that go on where one has failed, a message cut off, and errors lost on the way.

    A local class cannot be found by other ranks, and UnicodeDecodeError needs more than a message:
    they are raised as their closest base class elsewhere.
    """
    found = run(collectives, 3, tmp_path)
    long = "é" * 5000
    assert [one["mean fails"] for one in found] == [
        ["ValueError", f"on rank 1: {long}"],
        ["ValueError", long],
        ["ValueError", f"on rank 1: {long}"],
    ]
    assert [one["together fails"] for one in found] == [
        ["LocalError", "of rank 0"],
        ["ArithmeticError", "on rank 0: of rank 0"],
        ["ArithmeticError", "on rank 0: of rank 0"],
    ]
    assert [one["needs arguments"][0] for one in found] == [
        "UnicodeError",
        "UnicodeError",
        "UnicodeDecodeError",
    ]


def test_one_process_communicates_nothing() -> None:
    """Catches a collective that waits, or copies, without a group."""
    alone, tensor = Ranks(), torch.tensor([1.0])
    same = [alone.all_reduce_sum(tensor), alone.all_gather(tensor), alone.broadcast(tensor)]
    assert all(one is tensor for one in same)
    assert alone.all_gather_object("own") == ["own"]
    assert alone.broadcast_object("own") == "own"
    assert [alone.any(True), alone.any(False)] == [True, False]
    with pytest.raises(ZeroDivisionError):
        alone.raise_together(lambda: 1 / 0)
