"""The upper bound of a measured value, and whether it is near enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stableopt
from stableopt.stability import Measurement, StabilityMargins


def test_a_default_search_does_not_return_the_second_eigenvalue() -> None:
    """Catches convergence at 0.97497, 5 % below the largest, from the start of this network and seed: it
    holds 1.5e-5 of the top eigenvector.
    """
    torch.manual_seed(146)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    margins = stableopt.measure(model, nn.MSELoss(), (x, y), quantities=("sharpness",))
    measurement = margins.measurements["sharpness"]
    assert measurement.converged
    assert measurement.value == pytest.approx(1.02434, rel=1e-5)  # by LAPACK, to its digits here
    assert measurement.certified


def test_margins_carry_the_bound_of_a_root_and_of_a_value() -> None:
    """Catches the bound of the eigenvalue reported as that of its root, and a bound that is dropped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    quantities = ("sharpness", "non_uniformity")
    margins = stableopt.measure(model, nn.MSELoss(), (x, y), quantities=quantities)
    record = margins.record()
    for name in quantities:
        measurement = margins.measurements[name]
        assert measurement.upper_bound is not None
        # 5 % of an eigenvalue are at most 5 % of its root.
        assert (
            measurement.value <= measurement.upper_bound <= 1.05 * measurement.value * (1 + 1e-12)
        )
        assert record[f"{name}_upper_bound"] == margins[name].upper_bound == measurement.upper_bound
    assert margins.certified
    assert record["certified"] == 1.0
    assert StabilityMargins.from_dict(margins.to_dict()) == margins


def test_an_open_gap_is_said() -> None:
    """Catches a value without a bound, or with one far above it, that counts as certified."""
    assert not Measurement(10.0, 1e-3, 3, converged=True).certified
    assert not Measurement(10.0, 1e-3, 3, converged=True, upper_bound=10.6).certified
    assert Measurement(-10.0, 1e-3, 3, converged=True, upper_bound=-9.6).certified
    model = nn.Linear(60, 4)
    torch.manual_seed(0)
    data = (torch.randn(30, 60), torch.randn(30, 4))
    margins = stableopt.measure(model, nn.MSELoss(), data, max_iter=4)
    measurement = margins.measurements["sharpness"]
    assert not measurement.converged
    assert not margins.certified
    assert measurement.upper_bound is not None


def test_errors_of_products_widen_the_bound() -> None:
    """Catches a bound that trusts products by finite differences."""
    exact = Measurement(10.0, 1e-3, 12, converged=True, upper_bound=10.4)
    measurement = exact.within(0.01, 0.03)
    assert measurement.upper_bound == pytest.approx(10.504)  # 10.4 and one per cent of it
    assert not measurement.certified
