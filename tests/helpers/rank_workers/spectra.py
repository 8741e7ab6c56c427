"""Spectra of one probe set that ranks share."""

from __future__ import annotations

from typing import Any

from oracles import small_data, small_network
from torch import nn

from rank_workers.shares import SAMPLES, group, own
from stableopt import measure

QUANTITIES = (
    *("top_eigenvalues", "trace", "spectrum"),
    *("gauss_newton_trace", "sigma_top_eigenvalues"),
)


def spectra() -> dict[str, Any]:
    """Measure the spectrum of each matrix; return the record and the densities."""
    margins = measure(
        small_network(),
        nn.MSELoss(),
        own(small_data(SAMPLES)),
        lr=0.3,
        batch_size=3,
        quantities=QUANTITIES,
        process_group=group(),
        tol=1e-8,
    )
    assert margins.failure is None, margins.failure
    assert margins.failures == {}
    record = margins.record()
    del record["seconds"]
    densities = margins.to_dict()["densities"]
    for name, density in densities.items():
        record |= {f"{name} node {index}": node for index, node in enumerate(density["nodes"][-3:])}
    return record
