"""`Setting`: device, data and folder of a part; `PartResult`: its result."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.data import Dataset, Images

__all__ = ["SIMULATED", "CannotRunError", "PartResult", "Setting"]

SIMULATED = "simulated"
"""Name of the tests' simulated accelerator, on which every part runs in miniature."""

ROOT = Path(__file__).parents[2]


class CannotRunError(Exception):
    """Raised by a part that this machine cannot run, with the reason."""


@dataclass(frozen=True)
class PartResult:
    """The result of a part.

    Attributes:
        headline: a summary in one line.
        rows: all numbers, for the JSON file.
    """

    headline: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Device, data and folder of a part.

    Attributes:
        device: ``"cuda"``, ``"cuda:1"``, or :data:`SIMULATED`.
        out: the part's folder.
        data_dir: folder of the data; see :meth:`benchmarks.training.data.Dataset.load`.
    """

    device: str
    out: Path
    data_dir: Path | None = None

    @property
    def miniature(self) -> bool:
        """Whether to use the smallest sizes."""
        return self.device == SIMULATED

    @property
    def data(self) -> str:
        """Fashion-MNIST if its files are there, else scikit-learn's digits."""
        folder = self.data_dir or os.environ.get("STABLEOPT_DATA")
        has_fashion_mnist = folder is not None and any(
            Path(folder).glob("**/train-images-idx3-ubyte.gz")
        )
        return "fashion-mnist" if has_fashion_mnist and not self.miniature else "digits"

    def images(self) -> Images:
        """Return 1,000 images on the device, in miniature 40."""
        return (
            Dataset(self.data, 40 if self.miniature else 1000).load(self.data_dir).to(self.device)
        )

    def wait(self) -> None:
        """Synchronize with the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def prepare(self) -> None:
        """Set up this process for the device; call it before autograd is used."""
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
            # NCCL uses the current device.
            torch.cuda.set_device(torch.device(self.device).index or 0)
