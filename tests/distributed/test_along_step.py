"""Margins along the step on several ranks are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles import small_data
from rank_processes import NEEDS_FSDP_ON_CPU, run
from rank_workers.along_step import along_steps, stepped
from rank_workers.fully_sharded import wide_network
from rank_workers.shares import SAMPLES
from torch import nn

from stableopt import critical_sharpness


@pytest.mark.parametrize(
    "sharded", [pytest.param(True, marks=NEEDS_FSDP_ON_CPU), False], ids=["FSDP2", "DDP"]
)
def test_ranks_agree_with_one_process(sharded: bool, tmp_path: Path) -> None:
    """Catches an inner product of one rank's shard, losses of one rank's samples, and a trace."""
    zero, one = run(along_steps, 2, tmp_path, sharded)
    model = wide_network()
    monitor, optimizer = stepped(model, small_data(SAMPLES))
    alone = critical_sharpness(model, nn.MSELoss(), small_data(SAMPLES), optimizer=optimizer)
    for found in (zero, one):
        assert found["untouched"]
        assert found["failures"] == [[None, {}]] * 2
        # Sums in another order, which the differences of losses magnify.
        expected = [m.realised_edge for m in monitor.history]
        assert found["realised"] == pytest.approx(expected, rel=1e-8)
        expected = [m.critical_sharpness for m in monitor.history]
        assert found["critical"] == pytest.approx(expected, rel=1e-6)
        assert found["next"] == pytest.approx(alone.value, rel=1e-6)
        assert found["passes"] == alone.passes
    assert zero == one
