"""The experiments' data, command line and judgement; and each of them, small."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.steering_case import REGIONS
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import data as datasets
from benchmarks import escape, escape_case, gd_sharpness
from benchmarks.networks import WIDTHS, fully_connected
from stableopt import StabilityMargins

ROOT = Path(__file__).parents[2]


def fashion_mnist_folder() -> Path:
    """Return a folder with real Fashion-MNIST files, or skip."""
    named = [os.environ.get("STABLEOPT_DATA"), ROOT.parent / "shared" / "data"]
    for place in map(Path, filter(None, named)):
        if (place / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").exists():
            return place
    pytest.skip("no Fashion-MNIST files: set STABLEOPT_DATA to a folder that has FashionMNIST/raw")


def quiet() -> Console:
    return Console(quiet=True)


def test_digits_are_split_and_scaled() -> None:
    """Catches images that are in both sets, and a scale that is not [0, 1]."""
    images = datasets.load("digits")
    assert images.x.shape == (1000, 64)
    assert images.test_x.shape == (797, 64)
    assert (float(images.x.min()), float(images.x.max())) == (0.0, 1.0)
    assert torch.equal(images.y.sum(1), torch.ones(1000))
    assert not (torch.cdist(images.test_x, images.x) == 0).any()


def test_random_labels_change_only_the_first_targets() -> None:
    """Catches labels of the test set, or images, that change with them."""
    clean, noisy = datasets.load("digits"), datasets.load("digits", random_labels=200)
    changed = (clean.y != noisy.y).any(1)
    # One in ten random labels is the right one.
    assert 150 < int(changed[:200].sum()) < 200
    assert not changed[200:].any()
    assert torch.equal(clean.test_labels, noisy.test_labels)
    with pytest.raises(ValueError, match="random_labels=1001"):
        datasets.load("digits", random_labels=1001)


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
    """Catches a download where files are at hand, and a download without its checksum."""
    import pooch

    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((url, known_hash))
        write_idx(tmp_path / fname, np.zeros((20, 28, 28) if "images" in fname else 20, np.uint8))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("STABLEOPT_DATA", raising=False)
    images = datasets.load("fashion-mnist", n=15)
    assert images.x.shape == (15, 784)
    assert [known for _, known in asked] == [
        f"md5:{md5}" for md5 in datasets.FASHION_MNIST_MD5.values()
    ]
    asked.clear()
    datasets.load("fashion-mnist", n=15, folder=tmp_path)
    monkeypatch.setenv("STABLEOPT_DATA", str(tmp_path))
    datasets.load("fashion-mnist", n=15)
    assert asked == []
    with pytest.raises(ValueError, match="n=21: fashion-mnist has 20 training"):
        datasets.load("fashion-mnist", n=21)


def test_real_fashion_mnist() -> None:
    """Catches a loader that only reads files of its own making."""
    images = datasets.load("fashion-mnist", folder=fashion_mnist_folder())
    assert images.x.shape == (1000, 784)
    # The first training image is an ankle boot, class 9; about a tenth of all are.
    assert int(images.y[0].argmax()) == 9
    assert images.y.sum(0).min() > 80
    assert 0.2 < float(images.x.mean()) < 0.4


def test_the_network_is_the_papers() -> None:
    """Catches another width or depth, and an initialisation that draws from the global generator."""
    state = torch.get_rng_state()
    model = fully_connected(WIDTHS["fashion-mnist"], seed=0)
    assert sum(p.numel() for p in model.parameters()) == 898_510
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("a", "s", "escapes", "says"),
    [
        (3.9, 3.9, False, "stable, will stay"),
        (4.0, 4.0, False, "stable, will stay"),
        (4.1, 1.0, True, "a = 4.10 > 2/η = 4.00"),
        (1.0, 4.1, True, "s = 4.10 > √B/η = 4.00"),
    ],
)
def test_predictions_follow_the_measured_numbers(
    a: float, s: float, escapes: bool, says: str
) -> None:
    """Catches a prediction that is written down instead of computed."""
    margins = StabilityMargins(
        batch_size=4,
        sharpness=a,
        sharpness_limit=4.0,
        non_uniformity=s,
        non_uniformity_limit=4.0,
    )
    prediction = escape_case.predict(margins)
    assert prediction.escapes is escapes
    assert says in prediction.why
    with pytest.raises(ValueError, match="not measured: not finite"):
        escape_case.predict(StabilityMargins(failure="not finite"))


def test_an_escape_is_a_tenfold_rise_or_a_loss_that_is_lost() -> None:
    """Catches a NaN that compares as no rise, and a verdict that is always right."""
    start = [StabilityMargins(batch_size=1)]
    for losses, at in (
        ([1.0, 9.9, 2.0], None),
        ([1.0, 2.0, 10.0], 20),
        ([1.0, float("nan"), 1.0], 10),
    ):
        for said in (True, False):
            trace = escape_case.Trace(
                escape_case.Prediction(said, ""), start, [0, 10, 20], losses, 0.5
            )
            assert trace.escaped_at == at
            assert trace.right == (said == (at is not None))


def test_escape_end_to_end(tmp_path: Path) -> None:
    """Catches a piece that does not fit the next: at a coarse minimum, with two short SGD runs."""
    config = escape.Config(
        out=tmp_path, n=200, target_loss=0.02, batch_sizes=(1, 64), steps=40, measure_every=20
    )
    result = escape.run(config, quiet())
    assert json.loads((tmp_path / "escape.json").read_text()) == result
    assert result["minimum"]["loss"] <= 0.02
    for run in result["runs"]:
        a, s = result["minimum"]["sharpness"], result["minimum"]["non_uniformity"]
        limit = (run["batch_size"] * 199 / (200 - run["batch_size"])) ** 0.5 / 0.5
        assert (run["predicted"] == "escape") == (a > 4 or s > limit)
    for name in ("escape.png", "diagram.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {
        "gd",
        "sgd-B1",
        "sgd-B64",
    }


def test_gd_sharpness_end_to_end(tmp_path: Path) -> None:
    """Catches a table whose numbers are not those of the run: at loss 0.03 GD is below its limit,
    and a rate that diverges is left out and said.
    """
    config = gd_sharpness.Config(out=tmp_path, n=200, lrs=(0.5, 500.0), target_loss=0.03)
    console = Console(record=True, width=120, file=io.StringIO())
    rows = gd_sharpness.run(config, console)
    assert [row["lr"] for row in rows] == [0.5]
    assert 0 < rows[0]["sharpness"] < 1.1 * rows[0]["limit"]
    assert json.loads((tmp_path / "gd-sharpness.json").read_text()) == rows
    assert "η = 500: the loss is" in console.export_text()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Catches a setting that is dropped or taken as text, and a name that is not listed."""
    arguments = ["--set", "lrs=0.5,0.25", "--set", "n=100", "--set", "target_loss=0.08"]
    assert cli.main(["run", "gd-sharpness", "--out", str(tmp_path), *arguments]) == 0
    rows = json.loads((tmp_path / "gd-sharpness.json").read_text())
    assert [row["lr"] for row in rows] == [0.5, 0.25]
    capsys.readouterr()
    assert cli.main(["list"]) == 0
    assert "Figures 1 and 8" in capsys.readouterr().out
    for bad, says in (
        ("speed=3", "expected one of data, data_dir"),
        ("n=many", "n=many: expected int"),
        ("n", "and =VALUE"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["run", "escape", "--set", bad])
        assert says in capsys.readouterr().err
