"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_examples_run_under_torchrun(name: str) -> None:
    """Catches an example that the code has left behind, or whose ranks wait for each other."""
    path = ROOT / "examples" / f"{name}.py"
    assert f"torchrun --nproc-per-node 2 examples/{name}.py" in path.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    # Of one rank alone: a record of each measurement, then the last one.
    assert done.stdout.count("2 ranks") == 1
    assert "sharpness" in done.stdout
