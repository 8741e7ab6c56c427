"""Measurements and tracking on an accelerator: the CPU's numbers, and few transfers to the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_runs
import torch
from simulated_device import NEEDS_SIMULATED_DEVICE, on_both

from stableopt.stability.measure.quantities import QUANTITIES

pytestmark = NEEDS_SIMULATED_DEVICE

# The same operations in float32 on the same processor; the devices' paths may order sums apart.
SAME = 1e-5

PRECONDITIONED = {"preconditioned_sharpness": "Adam"}
ELSEWHERE = {"realised_edge", "critical_sharpness", "generalised_sharpness", "block_edge"}
"""Of steps that a monitor sees, of optimizers in a norm, and of several optimizers."""


def agree(device: dict[str, float], cpu: dict[str, float]) -> None:
    assert device == pytest.approx(cpu, rel=SAME, nan_ok=True)


def test_each_quantity_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Catches a quantity with a tensor on the host among those on the device."""
    names = [(name, PRECONDITIONED.get(name)) for name in QUANTITIES if name not in ELSEWHERE]
    cpu, device, _ = on_both(simulated_runs.all_measured, tmp_path, names)
    assert len(cpu) == len(names)
    for name in cpu:
        assert name in cpu[name]
        agree(device[name], cpu[name])


def test_checks_read_as_often_for_any_model_and_data(tmp_path: Path) -> None:
    """Catches a number read for each parameter tensor, or for each sample."""
    _, found, _ = on_both(simulated_runs.all_reads, tmp_path)
    sharpness = found["sharpness"]
    assert sharpness["24 tensors"] == sharpness["4 tensors"] == sharpness["48 samples"] <= 60
    # Samples are drawn one by one until four differ, at most 64, which depends on what they are.
    for others in found["non_uniformity"].values():
        assert 0 <= others - sharpness["4 tensors"] <= 10


@pytest.mark.parametrize("name", ["SGD", "GD", "LBFGS", "AdamW"])
def test_tracked_training_is_that_of_the_cpu(name: str, tmp_path: Path) -> None:
    """Catches state, warm starts or recorded steps on the wrong device, and reads of each tensor."""
    cpu, device, _ = on_both(simulated_runs.trained, tmp_path, name)
    assert len(cpu["records"]) == len(device["records"]) > 2
    for of_device, of_cpu in zip(device["records"], cpu["records"], strict=True):
        agree(of_device, of_cpu)
    torch.testing.assert_close(device["weights"], cpu["weights"], rtol=SAME, atol=SAME)
    if name in ("SGD", "GD"):  # the loss, the length of the gradient, and the end of the solver
        assert device["reads"] <= device["products"] + 3
    elif name == "AdamW":  # and the losses along the step
        assert device["reads"] <= device["products"] + 10
