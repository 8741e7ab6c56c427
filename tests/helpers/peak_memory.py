"""The peak memory of this process."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """Return the largest resident memory so far, in MiB, on Linux.

    Not ``getrusage``'s, which survives ``exec``: a child's value starts at its parent's.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024  # it is in KiB
    raise OSError(f"{STATUS} has no VmHWM")
