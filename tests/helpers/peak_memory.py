"""The peak memory of this process."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """Return the largest resident memory so far, in MiB, on Linux.

    Not ``getrusage``'s: that is kept through ``exec``, so that a child's begins at what its parent
    had, whose memory it shared for a moment.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1024  # it is in KiB
    raise OSError(f"{STATUS} has no VmHWM")
