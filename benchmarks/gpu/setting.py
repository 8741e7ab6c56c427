"""`Setting`: the device, data and folder that a part runs with, and what a part returns."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.data import Dataset, Images

__all__ = ["SIMULATED", "CannotRunError", "Found", "Setting"]

SIMULATED = "simulated"
"""The accelerator of the tests, in Python; on it every part runs in miniature."""

ROOT = Path(__file__).parents[2]


class CannotRunError(Exception):
    """Raised by a part that this machine cannot run, with the reason."""


@dataclass(frozen=True)
class Found:
    """What a part found.

    Attributes:
        headline: in one line.
        rows: in full, for a JSON file.
    """

    headline: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What a part runs with.

    Attributes:
        device: ``"cuda"``, ``"cuda:1"``, or :data:`SIMULATED`.
        out: its folder.
        data_dir: where the data are; see :func:`benchmarks.training.data.load`.
    """

    device: str
    out: Path
    data_dir: Path | None = None

    @property
    def miniature(self) -> bool:
        """Whether to run with the smallest sizes."""
        return self.device == SIMULATED

    @property
    def data(self) -> str:
        """Fashion-MNIST where it is, else the digits, which come with scikit-learn."""
        named = self.data_dir or os.environ.get("STABLEOPT_DATA")
        there = named is not None and any(Path(named).glob("**/train-images-idx3-ubyte.gz"))
        return "fashion-mnist" if there and not self.miniature else "digits"

    def images(self) -> Images:
        """Return 1,000 images on the device, in miniature 40."""
        return (
            Dataset(self.data, 40 if self.miniature else 1000).load(self.data_dir).to(self.device)
        )

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Set this process up for the device, before anything is differentiated."""
        if self.miniature:
            sys.path.insert(0, str(ROOT / "tests" / "helpers"))
            try:
                import simulated_device
            except ImportError as error:
                raise CannotRunError(
                    f"--device {SIMULATED} needs a clone of the repository, with its tests: {error}"
                ) from None
            simulated_device.install()
            torch.set_num_threads(1)
        elif self.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(self.device).index or 0)  # NCCL goes by it
