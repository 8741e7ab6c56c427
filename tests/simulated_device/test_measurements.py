"""Measurements and tracking on an accelerator: the CPU's numbers, and few transfers to the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated_runs
import torch
from simulated_device import DEVICE, NAME, NEEDS_SIMULATED_DEVICE, on_both

from stableopt.stability.measure.registry import QUANTITIES

pytestmark = NEEDS_SIMULATED_DEVICE

# The same operations in float32 on the same processor; the devices' paths may order sums apart.
SAME = 1e-5

OF_OPTIMIZERS = {
    "Adam": ["preconditioned_sharpness"],
    "Rprop": ["generalised_sharpness"],
    "two": ["block_edge"],
}
"""Quantities of a preconditioner, of steps in a norm, and of several optimizers."""

ELSEWHERE = {"realised_edge", "critical_sharpness"}
"""Of steps that a monitor sees."""


def agree(device: dict[str, float], cpu: dict[str, float]) -> None:
    assert device == pytest.approx(cpu, rel=SAME, nan_ok=True)


def test_each_quantity_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Catches a quantity with a tensor on the host among those on the device."""
    others = {*ELSEWHERE, *(name for names in OF_OPTIMIZERS.values() for name in names)}
    asked = {"": [name for name in QUANTITIES if name not in others], **OF_OPTIMIZERS}
    cpu, device, _ = on_both(simulated_runs.measured, tmp_path, asked)
    for names, of_cpu, of_device in zip(asked.values(), cpu, device, strict=True):
        assert not of_cpu["failed"]
        assert set(names) <= set(of_cpu)
        agree(of_device, of_cpu)


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
    if name in ("SGD", "GD"):
        assert device["reads"] <= device["products"]
    elif name == "AdamW":
        # A loss a pass along the step, and one at each end, two slopes, and whether it moved.
        assert device["reads"] <= device["products"] + device["passes"] + 5


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_reads_once_a_direction_and_once_a_closure(
    line_search: str | None, tmp_path: Path
) -> None:
    """Catches a number that decides by a transfer of its own, as of a pair after a search."""
    cpu, device, _ = on_both(simulated_runs.searched, tmp_path, line_search)
    iterations, calls, reads = device
    assert (iterations, calls) == cpu[:2]
    assert iterations == 8
    # A search that ends at another point than its last one reads once more.
    assert reads <= iterations + calls + (calls - iterations if line_search else 0)


def test_each_optimizer_is_tracked_as_on_the_cpu(tmp_path: Path) -> None:
    """Catches a preconditioner that is read to the host, and reads of each parameter tensor."""
    [cpu, _], [device, deeper], _ = on_both(simulated_runs.by_each, tmp_path)
    assert len(cpu) >= 4
    for name, (of_cpu, _) in cpu.items():
        agree(device[name][0], of_cpu)
    for name, (_, reads) in deeper.items():
        assert reads == device[name][1] <= 6


def test_loaders_of_the_host_and_ragged_chunks(tmp_path: Path) -> None:
    """Catches batches that stay where the loader made them, and a last chunk of another size."""
    cpu, device, _ = on_both(simulated_runs.from_a_loader, tmp_path)
    agree(device, cpu)


def test_suggestions_are_those_of_the_cpu(tmp_path: Path) -> None:
    cpu, device, _ = on_both(simulated_runs.suggested, tmp_path)
    assert len(cpu) == len(device) == 6
    for of_device, of_cpu in zip(device, cpu, strict=True):
        assert of_device[:2] == of_cpu[:2]
        assert of_device[2] == pytest.approx(of_cpu[2], rel=SAME)


def test_steering_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Catches a scheduler whose saved weights or decisions stay on one device."""
    cpu, device, _ = on_both(simulated_runs.steered, tmp_path)
    assert len(set(cpu[0])) == 5
    assert device[0] == pytest.approx(cpu[0], rel=SAME)
    agree(device[1], cpu[1])


def test_a_recorder_waits_for_the_device_only_when_it_reads(tmp_path: Path) -> None:
    """Catches a read at each step, as of a rate or of samples' indices on the device; and values that
    the training loop has changed in place when they are read.
    """
    (of_cpu, _), (of_device, reads), _ = on_both(simulated_runs.recorded, tmp_path, str(tmp_path))
    assert reads[:3] == [0, 0, 0] or DEVICE != NAME  # transfers are counted on the simulated one
    assert [step[:2] for step in of_device] == [step[:2] for step in of_cpu]
    assert [step[:2] for step in of_cpu] == [
        (0.5, [0, 1, 2, 3, 0]),
        (0.25, [1, 2, 3, 4, 2]),
        (0.125, [2, 3, 4, 5, 4]),
    ]
    for step, same in zip(of_device, of_cpu, strict=True):
        assert step[2:] == pytest.approx(same[2:], rel=SAME)


@pytest.mark.parametrize("name", list(simulated_runs.MOMENTUM))
def test_checkpoints_cross_devices(name: str, tmp_path: Path) -> None:
    """Catches momentum, L-BFGS pairs or starts of the solver left on the device that saved them."""
    stayed, moved, _ = on_both(simulated_runs.resumed, tmp_path, name)
    agree(moved["record"], stayed["record"])
    torch.testing.assert_close(moved["weights"], stayed["weights"], rtol=SAME, atol=SAME)
