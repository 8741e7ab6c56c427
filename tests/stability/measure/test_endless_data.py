"""Training sets without an end: limits and thresholds for ``dataset_size=math.inf``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import stableopt
from stableopt import StabilityRegion, UpdateRule, critical_batch_size, critical_lr, measure
from stableopt.stability import noise_factor

MSE = nn.MSELoss()


def setting() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    x = torch.randn(12, 3, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    return model, (x, model(x).detach())


def test_limits_are_those_of_independent_samples() -> None:
    """Catches the factor of sampling without replacement from the probe set."""
    model, data = setting()
    quantities = ("sharpness", "non_uniformity", "critical_lr", "theorem1")
    margins = measure(
        model, MSE, data, lr=0.1, batch_size=100, dataset_size=math.inf, quantities=quantities
    )
    assert margins.dataset_size is None
    assert margins.non_uniformity_limit == pytest.approx(10 / 0.1)
    large = measure(
        model, MSE, data, lr=0.1, batch_size=100, dataset_size=10**12, quantities=quantities
    )
    for name in ("critical_lr", "theorem1", "non_uniformity_limit"):
        assert getattr(margins, name) == pytest.approx(getattr(large, name), rel=1e-6)
    assert noise_factor(4, math.inf) == noise_factor(4) == 0.25
    region = StabilityRegion(UpdateRule(lr=0.1), 4, math.inf)
    assert region.max_non_uniformity == pytest.approx(20.0)


def test_a_monitor_observes_batches_of_any_size() -> None:
    """Catches a batch refused, or a warning, because the probe set is smaller."""
    model, data = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(40, 3, dtype=torch.float64)
    with stableopt.StabilityMonitor(
        optimizer, model, MSE, data, every=1, dataset_size=math.inf
    ) as monitor:
        MSE(model(x), x[:, :1]).backward()
        optimizer.step()
    assert monitor.margins is not None
    assert monitor.margins.non_uniformity_limit == pytest.approx(40**0.5 / 0.1)


def test_thresholds_agree_with_those_of_a_huge_data_set() -> None:
    """Catches a threshold that the end of the search, or a full batch, cuts off."""
    model, data = setting()
    huge, endless = ({"dataset_size": size} for size in (10**12, math.inf))
    rates = [critical_lr(model, MSE, data, 4, **size).value for size in (huge, endless)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    lr = 0.999 * rates[0]
    sizes = [critical_batch_size(model, MSE, data, lr, **size) for size in (huge, endless)]  # type: ignore[arg-type]
    assert sizes == [4, 4]
    edge = critical_lr(model, MSE, data).full_batch
    assert critical_batch_size(model, MSE, data, edge, dataset_size=math.inf) is None


def test_suggestions_have_no_full_batch() -> None:
    """Catches a row for a batch of all samples, although the data have no end."""
    model, data = setting()
    found = stableopt.suggest(model, MSE, data, dataset_size=math.inf)
    assert {row.batch_size for row in found.rows} == {1, 4, 16, 64}
    given = stableopt.suggest(model, MSE, data, dataset_size=math.inf, batch_sizes=[500])
    assert {row.batch_size for row in given.rows} == {500}


def test_a_step_on_all_of_them_is_refused() -> None:
    """Catches a full batch whose size is not known, and numbers that cannot be a size."""
    model, data = setting()
    rule = UpdateRule(lr=0.1, full_batch=True)
    with pytest.raises(ValueError, match="a step takes all samples"):
        measure(model, MSE, data, update_rule=rule, dataset_size=math.inf)
    optimizer = stableopt.GD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a step takes all samples"):
        optimizer.track(model, MSE, data, every=1, dataset_size=math.inf)
    for wrong in (math.nan, -math.inf, 12.5, 0):
        with pytest.raises(ValueError, match="dataset_size="):
            measure(model, MSE, data, lr=0.1, dataset_size=wrong)
