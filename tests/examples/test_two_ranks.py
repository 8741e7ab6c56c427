"""The examples run on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_processes import NEEDS_FSDP_ON_CPU, TIMEOUT, run_script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=NEEDS_FSDP_ON_CPU)])
def test_examples_run_on_two_ranks(name: str, tmp_path: Path) -> None:
    """Catches an example that the code has left behind, or whose ranks wait for each other.

    In the environment that torchrun makes, whose own start takes ten times as long as the example.
    """
    path = ROOT / "examples" / f"{name}.py"
    assert f"torchrun --nproc-per-node 2 examples/{name}.py" in path.read_text()
    zero, one = run_script(path, 2, tmp_path)
    # Of one rank alone: a record of each measurement, then the last one.
    assert zero.count("2 ranks") == 1
    assert "sharpness" in zero
    assert "2 ranks" not in one


# A worker thread of gloo that drops its last tensor while the interpreter ends takes the GIL, which
# aborts the process after all of its work (pytorch/pytorch#179291). DDP keeps the group alive until
# then, so a script cannot prevent it.
ABORT_AT_EXIT = "terminate called without an active exception"


def test_an_example_runs_by_torchrun() -> None:
    """Catches an environment that is torchrun's in the test above alone."""
    done = _torchrun("ddp.py")
    if ABORT_AT_EXIT in done.stderr:
        done = _torchrun("ddp.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks") == 1


def _torchrun(example: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(ROOT / "examples" / example)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
