"""A rank lost in the middle of a measurement is an error on the others, within the timeout."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run
from rank_workers.monitoring import losing

ANSWER_IN = 2.0


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_is_an_error_within_the_timeout(how: str, tmp_path: Path) -> None:
    """Catches a survivor that waits forever, or records a failed measurement and trains on."""
    survivor, lost = run(losing, 2, tmp_path, how, answer_in=ANSWER_IN)
    assert survivor["error"] == "LostRankError"
    assert "rank 0 of 2 got no answer" in survivor["message"]
    # Allows, on top of the timeout, for starting the measurement on a busy machine.
    assert survivor["seconds"] < ANSWER_IN + 30
    if how == "dies":
        assert lost is None
