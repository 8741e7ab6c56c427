"""The simulated device counts each transfer, and refuses tensors of the CPU."""

from __future__ import annotations

from pathlib import Path

import simulated_runs
from simulated_device import NEEDS_SIMULATED_DEVICE, on_both

pytestmark = NEEDS_SIMULATED_DEVICE


def test_every_way_to_read_counts_once(tmp_path: Path) -> None:
    """Catches a count that misses a kind of transfer, which would make all bars pass."""
    cpu, device, _ = on_both(simulated_runs.reading, tmp_path)
    assert set(cpu.values()) == {(0, 0)}
    assert device.pop("none") == (0, 0)
    assert device.pop("send") == (0, 1)
    assert set(device.values()) == {(1, 0)}


def test_tensors_of_two_devices_do_not_mix(tmp_path: Path) -> None:
    """Catches a device that computes what a GPU would refuse."""
    cpu, device, _ = on_both(simulated_runs.mixing, tmp_path)
    assert cpu == ""
    assert "one device" in device
