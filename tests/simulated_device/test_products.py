"""Operators on an accelerator have the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_runs
import torch
from simulated_device import NEEDS_SIMULATED_DEVICE, on_both

pytestmark = NEEDS_SIMULATED_DEVICE

# The same operations in float32 on the same processor; the devices' paths may order sums apart.
SAME = 1e-5


@pytest.mark.parametrize("name", list(simulated_runs.OPERATORS))
def test_products_and_lanczos_with_a_transfer_a_product(name: str, tmp_path: Path) -> None:
    """Catches a solver that reads each inner product, and products that read numbers."""
    cpu, device, _ = on_both(simulated_runs.eigenpair, tmp_path, name)
    torch.testing.assert_close(device["images"], cpu["images"], rtol=SAME, atol=SAME)
    assert device["value"] == pytest.approx(cpu["value"], rel=SAME)
    assert device["products"] == cpu["products"] > 4
    assert cpu["reads"] == 0
    assert device["reads"] <= device["products"]


def test_layers_with_structure(tmp_path: Path) -> None:
    """Catches a kind of layer whose rule makes an index or a mask on the host."""
    cpu, device, _ = on_both(simulated_runs.of_layers, tmp_path)
    assert device["ways"] == cpu["ways"]
    torch.testing.assert_close(device["product"], cpu["product"], rtol=SAME, atol=SAME)


def test_finite_differences(tmp_path: Path) -> None:
    """Catches points along a direction that are made on the host."""
    cpu, device, _ = on_both(simulated_runs.differenced, tmp_path)
    # In float64: differences enlarge the rounding of gradients.
    torch.testing.assert_close(device["product"], cpu["product"], rtol=SAME, atol=SAME)
    assert device["value"] == pytest.approx(cpu["value"], rel=SAME)
    assert device["products"] == cpu["products"] > 4
    # Also the norm of each direction, and what chooses the step and checks it.
    assert device["reads"] <= 2 * device["products"] + 10
