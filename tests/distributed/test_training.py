"""Optimizers, schedulers and samplers of replicas: every rank takes the same step."""

from __future__ import annotations

from pathlib import Path

from rank_processes import run
from rank_workers.training import quasi_newton, steered


def test_quasi_newton_steps_are_those_of_one_function(tmp_path: Path) -> None:
    """Catches line searches that part ways: each rank's own loss is another function."""
    zero, one = run(quasi_newton, 2, tmp_path)
    assert zero["weights"] == one["weights"]
    assert zero["calls"] == one["calls"]
    assert zero["losses"] != one["losses"]  # else the ranks could not have parted
    before, after = (sum(pair) for pair in zip(zero["losses"], one["losses"], strict=True))
    assert after < before / 2
    assert zero["failures"] == one["failures"] == [None, None]


def test_rate_and_batch_size_are_steered_together(tmp_path: Path) -> None:
    """Catches ranks with rates or batches of their own, which would leave replicas no replicas, and a
    batch that is taken for one rank's.
    """
    zero, one = run(steered, 2, tmp_path)
    assert zero == one
    assert {what for what, _, _ in zero["changes"]} == {"lr", "batch_size"}
    assert (zero["sizes"][0], zero["sizes"][-1]) == (4, 2)
    assert zero["observed"] == 4
