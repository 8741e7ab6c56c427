"""Escapes in words: runs that stay, runs that leave, and runs that diverge."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.experiments.escape.experiment import Escape, _remark
from benchmarks.training.escape import Escape as Found
from benchmarks.training.escape import Switch
from benchmarks.training.minimum import Minimum, Solution


class Done:
    """Stands for a store with one result."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def result(self, job: Any) -> Found:
        """Return it."""
        return self.found


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Found(None, 8.24, {}, predicted="stay"), "observed: stayed, the loss at most × 8.2"),
        (Found(20, 31.0, {}, predicted="escape"), "observed: escaped at step 20"),
        (Found(10, None, None, predicted="escape"), "observed: escaped at step 10"),
    ],
)
def test_a_line_for_every_end(found: Found, says: str) -> None:
    """Catches a headline that needs numbers which a diverged run does not have."""
    escape = Escape()
    switch = next(job for job in escape.jobs() if isinstance(job, Switch))
    line = escape.headline(switch, Done(found))  # type: ignore[arg-type]
    assert line is not None
    assert says in line


def test_a_minimum_has_a_line_too() -> None:
    """Catches minima without a headline."""
    escape = Escape()
    start = next(job for job in escape.jobs() if isinstance(job, Solution))
    minimum: Any = Minimum("reached", 100, 1e-4, sharpness=3.5, non_uniformity=5.0)
    line = escape.headline(start, Done(minimum))  # type: ignore[arg-type]
    assert line is not None
    assert "a = 3.50" in line


@pytest.mark.parametrize(("ratio", "says"), [(13.4, "13.4 times"), (None, "beyond all bounds")])
def test_remarks_on_runs_that_diverged(ratio: float | None, says: str) -> None:
    """Catches "nan times" in a remark."""
    row = SimpleNamespace(
        seed=0, random_labels=200, largest_loss_ratio=ratio, sharpness_after=float("nan")
    )
    assert _remark(row) == f"seed 0, 200 random labels: the loss rose {says}"
