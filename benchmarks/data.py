"""The images that the experiments train on: few, scaled to [0, 1], with one-hot targets."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["DATASETS", "Images", "load"]

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


@dataclass(frozen=True)
class Images:
    """A training and a test set.

    Attributes:
        name: of the data set.
        x: training images, flat, in [0, 1], ``(n, pixels)``.
        y: one-hot training targets ``(n, classes)``.
        test_x: test images.
        test_labels: test labels as integers.
    """

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of test images that ``model`` classifies rightly."""
        with torch.no_grad():
            return float((model(self.test_x).argmax(1) == self.test_labels).double().mean())


def load(name: str, *, n: int = 1000, folder: Path | None = None) -> Images:
    """Return the first ``n`` training images and all the others for testing.

    Args:
        name: ``"digits"`` or ``"fashion-mnist"``.
        n: training images.
        folder: where the files are, or are to be downloaded to; by default the environment's
            ``STABLEOPT_DATA``, else the user's cache folder. Digits come with scikit-learn.

    Raises:
        ValueError: for an unknown name, or more images than there are.
    """
    if name not in DATASETS:
        raise ValueError(f"data={name!r}: expected one of {sorted(DATASETS)}")
    if folder is None and os.environ.get("STABLEOPT_DATA"):
        folder = Path(os.environ["STABLEOPT_DATA"])
    return DATASETS[name](n, folder)


def _digits(n: int, folder: Path | None) -> Images:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # They come sorted by writer; the paper's sets are in random order.
    order = np.random.RandomState(0).permutation(len(images))
    x, labels = images[order] / 16, labels[order]
    return _split("digits", x[:n], labels[:n], x[n:], labels[n:], n)


def _fashion_mnist(n: int, folder: Path | None) -> Images:
    arrays = [read_idx(path) for path in _fashion_mnist_files(folder)]
    x, labels, test_x, test_labels = arrays
    x, test_x = (a.reshape(len(a), -1) / 255 for a in (x, test_x))
    return _split("fashion-mnist", x[:n], labels[:n], test_x, test_labels, n)


def _split(
    name: str,
    x: np.ndarray,
    labels: np.ndarray,
    test_x: np.ndarray,
    test_labels: np.ndarray,
    n: int,
) -> Images:
    if n < 1 or len(x) < n or not len(test_x):
        raise ValueError(f"n={n}: {name} has {len(x)} training and {len(test_x)} test images left")
    return Images(
        name=name,
        x=torch.tensor(x, dtype=torch.float32),
        y=nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), 10).float(),
        test_x=torch.tensor(test_x, dtype=torch.float32),
        test_labels=torch.tensor(test_labels, dtype=torch.int64),
    )


def _fashion_mnist_files(folder: Path | None) -> list[Path]:
    for place in (folder, folder and folder / "FashionMNIST" / "raw"):
        # A folder that the user named may hold a part of the data: its row counts decide, and the
        # checksums are for what is downloaded.
        if place is not None and all((place / name).exists() for name in FASHION_MNIST_MD5):
            return [place / name for name in FASHION_MNIST_MD5]
    import pooch

    target = folder / "FashionMNIST" / "raw" if folder else pooch.os_cache("stableopt")
    return [
        Path(pooch.retrieve(FASHION_MNIST_URL + name, f"md5:{md5}", fname=name, path=target))
        for name, md5 in FASHION_MNIST_MD5.items()
    ]


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped IDX file of unsigned bytes.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, each as
    a big-endian 32-bit integer, then the data.

    Raises:
        ValueError: if it is not such a file, or cut short.
    """
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: {len(content) - start} bytes of data for shape {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


DATASETS: dict[str, Callable[[int, Path | None], Images]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
}
