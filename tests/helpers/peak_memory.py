"""The peak memory of this process, and of one of its own for a piece of code."""

from __future__ import annotations

import os
import subprocess
import sys
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


def peak_of_process(code: str, folder: Path, **environment: str) -> float:
    """Return what ``code`` prints, a number of MiB, in a fresh process, since peaks never fall.

    It runs in ``folder``, with the environment of this process and the variables given.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


EAGER_RETURN = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""With it freed tensors go back to the system at once, so that the peak is of what is alive."""
