"""Ranks with a shard of the probe set each find the spectrum that one process finds on all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run
from rank_workers.spectra import spectra


def test_ranks_find_the_spectrum_of_one_process(tmp_path: Path) -> None:
    """Catches signs that each rank draws for itself, and ranks that stop after different products."""
    zero, one = run(spectra, 2, tmp_path)
    assert zero == one
    # Sums in another order, which Lanczos carries into nodes that have not converged.
    assert zero == pytest.approx(spectra(), rel=1e-6, abs=1e-8)
