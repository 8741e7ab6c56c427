"""Optimizers, schedulers and samplers of replicas: every rank takes the same step."""

from __future__ import annotations

from pathlib import Path

from rank_processes import run
from rank_workers.training import (
    failing,
    measured_apart,
    quasi_newton,
    restored,
    steered,
    steered_seldom,
)


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


def test_ranks_communicate_only_about_new_measurements(tmp_path: Path) -> None:
    """Catches a broadcast at each training step, and a state that is up to date on rank 0 alone: a
    checkpoint that another rank saves would resume with a target relative to the present again.
    """
    zero, one = run(steered_seldom, 2, tmp_path)
    assert zero == one
    # The first step is that of the monitor's schedule.
    assert set(zero["broadcast at"]) == {1, 5, 10, 15, 20}
    assert zero["target"] == ["absolute", "absolute"]
    assert zero["state"]["seen"] == zero["state"]["scheduler"]["seen"] == 20


def test_rank_0_decides_for_ranks_that_measure_separately(tmp_path: Path) -> None:
    """Catches ranks that wait in a broadcast for others that have no new measurement."""
    zero, one = run(measured_apart, 2, tmp_path)
    assert zero == one
    assert set(zero["steps"]) <= {3, 6, 9, 12}  # rank 1 measures at even steps
    assert "restore" in zero["kinds"]


def test_every_rank_restores_weights_and_momentum(tmp_path: Path) -> None:
    """Catches momentum that only rank 0 restores: equal weights at first, and replicas that part with
    the next step.
    """
    zero, one = run(restored, 2, tmp_path)
    assert "restore" in zero["kinds"]
    assert zero == one
    for name in ("weights", "momentum"):
        assert zero[name][5] == zero[name][4]  # step 6 diverges
        assert zero[name][7] != zero[name][6]


def test_an_error_of_rank_0_ends_every_rank(tmp_path: Path) -> None:
    """Catches ranks that wait for decisions, or for kicked weights, until the timeout of the group."""
    zero, one = run(failing, 2, tmp_path)
    assert zero == {"law": "ValueError: no", "kick": "ValueError: no"}
    assert one == {"law": "ValueError: on rank 0: no", "kick": "ValueError: on rank 0: no"}
