"""The experiments' images are those of the data sets' files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.training import data as datasets
from benchmarks.training.data import Dataset

ROOT = Path(__file__).parents[3]


def data_folder(name: str) -> Path:
    """Return a folder that has a folder of real files in it, or skip."""
    named = [os.environ.get("STABLEOPT_DATA"), ROOT.parent / "shared" / "data"]
    for place in map(Path, filter(None, named)):
        if (place / name).is_dir():
            return place
    pytest.skip(f"no real files: set STABLEOPT_DATA to a folder that has {name}")


def test_digits_are_split_and_scaled() -> None:
    """Catches images that are in both sets, and a range that is not [0, 1]."""
    images = Dataset("digits").load()
    assert images.x.shape == (1000, 64)
    assert images.test_x.shape == (797, 64)
    assert (float(images.x.min()), float(images.x.max())) == (0.0, 1.0)
    assert torch.equal(images.y.sum(1), torch.ones(1000))
    assert not (torch.cdist(images.test_x, images.x) == 0).any()


def test_random_labels_change_only_the_first_targets() -> None:
    """Catches labels of the test set, or images, that change with them."""
    clean, noisy = Dataset("digits").load(), Dataset("digits", random_labels=200).load()
    changed = (clean.y != noisy.y).any(1)
    # One in ten random labels is the right one.
    assert 150 < int(changed[:200].sum()) < 200
    assert not changed[200:].any()
    assert torch.equal(clean.test_labels, noisy.test_labels)
    with pytest.raises(ValueError, match="random_labels=1001"):
        Dataset("digits", random_labels=1001).load()


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def test_idx_files_are_read_back(tmp_path: Path) -> None:
    """Catches a byte order or an offset that is wrong: written here by the format's definition."""
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(datasets.read_idx(tmp_path / "a.gz"), array)
    with gzip.open(tmp_path / "a.gz") as whole, gzip.open(tmp_path / "short.gz", "wb") as file:
        file.write(whole.read()[:-1])
    with pytest.raises(ValueError, match=r"23 bytes of data for shape \(2, 3, 4\)"):
        datasets.read_idx(tmp_path / "short.gz")
    with gzip.open(tmp_path / "text.gz", "wb") as file:
        file.write(b"hello")
    with pytest.raises(ValueError, match="expected an IDX file"):
        datasets.read_idx(tmp_path / "text.gz")


def test_a_folder_that_is_named_is_used_and_downloads_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a download where the files are given, and a download without its checksum."""
    import pooch

    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        write_idx(tmp_path / fname, np.zeros((20, 28, 28) if "images" in fname else 20, np.uint8))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("STABLEOPT_DATA", raising=False)
    images = Dataset("fashion-mnist", n=15).load()
    assert images.x.shape == (15, 784)
    assert [checksum for _, checksum in asked] == [
        f"md5:{md5}" for md5 in datasets.FASHION_MNIST_MD5.values()
    ]
    asked.clear()
    Dataset("fashion-mnist", n=15).load(tmp_path)
    monkeypatch.setenv("STABLEOPT_DATA", str(tmp_path))
    Dataset("fashion-mnist", n=15).load()
    assert asked == []
    with pytest.raises(ValueError, match="n=21: fashion-mnist has 20 training"):
        Dataset("fashion-mnist", n=21).load()
    with pytest.raises(ValueError, match="n=0: expected at least 1"):
        Dataset("fashion-mnist", n=0).load()


def test_real_fashion_mnist() -> None:
    """Catches a loader that only reads files of its own making."""
    images = Dataset("fashion-mnist").load(data_folder("FashionMNIST"))
    assert images.x.shape == (1000, 784)
    # The first training image is an ankle boot, class 9; about a tenth of all are.
    assert int(images.y[0].argmax()) == 9
    assert images.y.sum(0).min() > 80
    assert 0.2 < float(images.x.mean()) < 0.4


def write_cifar10(path: Path, labels: list[int]) -> np.ndarray:
    """Write images that each have one value everywhere: their number."""
    rows = [bytes([label]) + bytes([number]) * 3072 for number, label in enumerate(labels)]
    path.write_bytes(b"".join(rows))
    return np.array(labels)


def test_cifar10_files_are_read_back(tmp_path: Path) -> None:
    """Catches an offset, a label that is taken for a pixel, a test image in the training set, and a
    choice of classes that takes others.
    """
    folder = tmp_path / datasets.CIFAR10_FOLDER
    folder.mkdir()
    labels = write_cifar10(folder / "data_batch_1.bin", [0, 5, 1, 0, 9])
    write_cifar10(folder / "data_batch_2.bin", [1, 1, 3])
    write_cifar10(folder / "test_batch.bin", [1, 7, 0])
    x, read = datasets.read_cifar10(folder / "data_batch_1.bin")
    assert np.array_equal(read, labels)
    assert x.shape == (5, 3, 32, 32)
    assert [int(image.max()) for image in x] == [int(image.min()) for image in x] == [0, 1, 2, 3, 4]
    two = Dataset("cifar10-2", n=4).load(tmp_path)
    # Of the first file images 0, 2 and 3 are airplanes or automobiles, of the second image 0.
    assert [round(255 * float(image.mean())) for image in two.x] == [0, 2, 3, 0]
    assert two.y.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert two.test_labels.tolist() == [1, 0]
    every = Dataset("cifar10", n=8).load(folder)
    assert every.y.argmax(1).tolist() == [0, 5, 1, 0, 9, 1, 1, 3]


def test_broken_cifar10_files_are_refused(tmp_path: Path) -> None:
    """Catches a file that is cut short or is something else, read as images of noise."""
    write_cifar10(tmp_path / "short.bin", [1, 2])
    (tmp_path / "short.bin").write_bytes((tmp_path / "short.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match="6145 bytes, expected a multiple"):
        datasets.read_cifar10(tmp_path / "short.bin")
    write_cifar10(tmp_path / "labels.bin", [1, 200])
    with pytest.raises(ValueError, match="a label is 200"):
        datasets.read_cifar10(tmp_path / "labels.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        datasets.read_cifar10(tmp_path / "empty.bin")


def test_real_cifar10() -> None:
    """Catches a loader that only reads files of its own making."""
    images = Dataset("cifar10-2").load(data_folder(datasets.CIFAR10_FOLDER))
    assert images.x.shape == (1000, 3, 32, 32)
    assert images.y.sum(0).tolist() == [500, 500]
    # Airplanes are seen against the sky: on average more blue than automobiles.
    planes, cars = (images.x[images.y[:, k] == 1].mean((0, 2, 3)) for k in (0, 1))
    assert planes[2] > cars[2]


def test_accuracy_is_the_share_that_is_right() -> None:
    """Catches a batch that is left out, or means of unequal batches."""
    x = torch.arange(2500.0)[:, None]
    labels = (torch.arange(2500) % 2 == 0).long()
    images = datasets.Images(x[:1], x[:1], x, labels)
    wrong_at_the_end = (torch.arange(2500) < 2250).float()

    def model(x: torch.Tensor) -> torch.Tensor:
        rows = x[:, 0].long()
        right = wrong_at_the_end[rows] == 1
        guess = torch.where(right, labels[rows], 1 - labels[rows])
        return torch.nn.functional.one_hot(guess, 2).float()

    assert images.accuracy(model) == 0.9


def test_chunks_cut_colour_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last chunk that is dropped, targets of other images, and grey images in pieces."""
    monkeypatch.setattr(datasets, "COLOUR_CHUNK", 4)
    y = torch.arange(10.0)[:, None]
    for shape, sizes in (((10, 3, 2, 2), [4, 4, 2]), ((10, 5), [10])):
        images = datasets.Images(y.view(10, *[1] * (len(shape) - 1)).expand(shape), y, y, y)
        chunks = images.chunks()
        assert [len(x) for x, _ in chunks] == sizes
        assert images.chunk_size == (4 if len(shape) == 4 else None)
        for x, targets in chunks:
            assert torch.equal(x.flatten(1)[:, :1], targets)
        assert images.samples == (images.x, images.y)
