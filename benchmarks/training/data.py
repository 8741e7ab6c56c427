"""`Dataset` and `Images`: the experiments' images, scaled to [0, 1], with one-hot targets."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.runner import Work

__all__ = ["DATASETS", "Dataset", "Images", "images_for"]

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FOLDER = "cifar-10-batches-bin"

COLOUR_CHUNK = 250
"""Colour images per forward pass: more would push their activations out of the CPU's cache."""


@dataclass(frozen=True)
class Images:
    """A training and a test set.

    Attributes:
        x: training images in [0, 1], flat ``(n, pixels)``, or ``(n, 3, 32, 32)`` in colour.
        y: one-hot training targets ``(n, classes)``.
        test_x: test images.
        test_labels: test labels as integers.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_labels: Tensor

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """The training images and their targets."""
        return self.x, self.y

    @property
    def chunk_size(self) -> int | None:
        """Training images per forward pass: ``None`` for all, or :data:`COLOUR_CHUNK`."""
        return None if self.x.ndim == 2 else COLOUR_CHUNK

    def chunks(self) -> list[tuple[Tensor, Tensor]]:
        """Return the training set in chunks of :attr:`chunk_size`."""
        size = self.chunk_size or len(self.x)
        return list(zip(self.x.split(size), self.y.split(size), strict=True))

    def accuracy(self, model: Callable[[Tensor], Tensor]) -> float:
        """Return the fraction of test images that ``model`` classifies correctly."""
        with torch.no_grad():
            parts = [model(x).argmax(1) for x in self.test_x.split(1000)]
        return float((torch.cat(parts) == self.test_labels).double().mean())

    def to(self, device: str) -> Images:
        """Return the images on another device; colour images in channels-last memory format."""
        tensors = (getattr(self, field.name) for field in fields(self))
        return Images(*(_channels_last(t.to(device)) for t in tensors))


def _channels_last(x: Tensor) -> Tensor:
    # On a CPU this layout reduces the time of the small VGG's convolutions to 0.6.
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@dataclass(frozen=True)
class Dataset:
    """A data set: its first ``n`` training images, and its test images.

    Attributes:
        name: ``"digits"`` (comes with scikit-learn), ``"fashion-mnist"``, ``"cifar10"``, or
            ``"cifar10-2"``: its airplanes and automobiles.
        n: number of training images. The digits have no test set: their other images serve for testing.
        random_labels: how many training images get a random label.

    >>> images = Dataset("digits", n=100).load()
    >>> images.x.shape, images.y.shape
    (torch.Size([100, 64]), torch.Size([100, 10]))
    """

    name: str = "digits"
    n: int = 1000
    random_labels: int = 0

    def load(self, folder: Path | None = None) -> Images:
        """Return the images.

        Args:
            folder: folder of the files, into which missing ones are downloaded; by default the
                environment's ``STABLEOPT_DATA``, else the user's cache folder.

        Raises:
            ValueError: for an unknown name, or if the data set has fewer than ``n`` images.
        """
        if self.name not in DATASETS:
            raise ValueError(f"data={self.name!r}: expected one of {sorted(DATASETS)}")
        if folder is None and os.environ.get("STABLEOPT_DATA"):
            folder = Path(os.environ["STABLEOPT_DATA"])
        if not 0 <= self.random_labels <= self.n:
            raise ValueError(f"random_labels={self.random_labels}: expected from 0 to n={self.n}")
        images = DATASETS[self.name](self.n, folder)
        y, classes = images.y.clone(), images.y.shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(classes, (self.random_labels,), generator=generator)
        y[: self.random_labels] = nn.functional.one_hot(drawn, classes).float()
        return replace(images, y=y)


def images_for(data: Dataset, work: Work) -> Images:
    """Return the images on the job's device; they are loaded once per process."""
    return _images(data, work.place.data_dir, work.place.device)


@cache
def _images(data: Dataset, folder: Path | None, device: str) -> Images:
    return data.load(folder).to(device)


def _digits(n: int, folder: Path | None) -> Images:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # scikit-learn sorts them by writer; the paper's data sets are in random order.
    order = np.random.RandomState(0).permutation(len(images))
    x, labels = images[order] / 16, labels[order]
    return _split("digits", x[:n], labels[:n], x[n:], labels[n:], n, classes=10)


def _fashion_mnist(n: int, folder: Path | None) -> Images:
    arrays = [read_idx(path) for path in _fashion_mnist_files(folder)]
    x, labels, test_x, test_labels = arrays
    x, test_x = (a.reshape(len(a), -1) / 255 for a in (x, test_x))
    return _split("fashion-mnist", x[:n], labels[:n], test_x, test_labels, n, classes=10)


def _cifar10(n: int, folder: Path | None, classes: int) -> Images:
    paths = _cifar10_files(folder)
    x, labels = (
        np.concatenate(parts) for parts in zip(*map(read_cifar10, paths[:-1]), strict=True)
    )
    test_x, test_labels = read_cifar10(paths[-1])
    selected, test_selected = labels < classes, test_labels < classes
    return _split(
        f"cifar10 with {classes} classes",
        x[selected][:n] / 255,
        labels[selected][:n],
        test_x[test_selected] / 255,
        test_labels[test_selected],
        n,
        classes,
    )


def _split(
    name: str,
    x: np.ndarray,
    labels: np.ndarray,
    test_x: np.ndarray,
    test_labels: np.ndarray,
    n: int,
    classes: int,
) -> Images:
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1 training image")
    if len(x) < n or not len(test_x):
        raise ValueError(
            f"n={n}: {name} has {len(x)} training and {len(test_x)} test images, expected at least"
            f" {n} and 1"
        )
    return Images(
        x=torch.tensor(x, dtype=torch.float32),
        y=nn.functional.one_hot(torch.tensor(labels, dtype=torch.int64), classes).float(),
        test_x=torch.tensor(test_x, dtype=torch.float32),
        test_labels=torch.tensor(test_labels, dtype=torch.int64),
    )


def _fashion_mnist_files(folder: Path | None) -> list[Path]:
    for candidate in (folder, folder and folder / "FashionMNIST" / "raw"):
        # No checksums here: a folder that the user named may hold a part of the data.
        if candidate is not None and all((candidate / name).exists() for name in FASHION_MNIST_MD5):
            return [candidate / name for name in FASHION_MNIST_MD5]
    import pooch

    target = folder / "FashionMNIST" / "raw" if folder else pooch.os_cache("stableopt")
    return [
        Path(pooch.retrieve(FASHION_MNIST_URL + name, f"md5:{md5}", fname=name, path=target))
        for name, md5 in FASHION_MNIST_MD5.items()
    ]


def _cifar10_files(folder: Path | None) -> list[Path]:
    """Return the paths of the training batches, followed by the test batch."""
    for candidate in (folder, folder and folder / CIFAR10_FOLDER):
        if candidate is not None and (candidate / "test_batch.bin").exists():
            return [*sorted(candidate.glob("data_batch_*.bin")), candidate / "test_batch.bin"]
    import pooch

    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]
    members = [f"{CIFAR10_FOLDER}/{name}" for name in names]
    unpacked = pooch.retrieve(
        CIFAR10_URL,
        f"md5:{CIFAR10_MD5}",
        fname="cifar-10-binary.tar.gz",
        path=folder or pooch.os_cache("stableopt"),
        processor=pooch.Untar(members=members, extract_dir="."),
    )
    paths = {Path(path).name: Path(path) for path in unpacked}
    return [paths[name] for name in names]


def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``(n, 3, 32, 32)`` and labels of a CIFAR-10 binary file.

    Each image is one byte with its label, then 3,072 bytes: the red, green and blue planes.

    Raises:
        ValueError: if the file has another format or is truncated.
    """
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % 3073:
        raise ValueError(f"{path}: {content.size} bytes, expected a multiple of 3,073")
    rows = content.reshape(-1, 3073)
    if rows[:, 0].max() > 9:
        raise ValueError(f"{path}: a label is {rows[:, 0].max()}, expected at most 9")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a gzipped IDX file of unsigned bytes.

    The header is two zero bytes, the type (8 for unsigned bytes), the number of dimensions, and each
    dimension as a big-endian 32-bit integer. The data follow.

    Raises:
        ValueError: if the file has another format or is truncated.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None
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
    "cifar10": lambda n, folder: _cifar10(n, folder, classes=10),
    "cifar10-2": lambda n, folder: _cifar10(n, folder, classes=2),
}
